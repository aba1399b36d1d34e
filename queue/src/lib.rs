//! The job protocol over NATS JetStream, and the object store beside it: what worker, gateway and operator share.
//!
//! [`delivery`] pulls jobs by [`pull`]'s plan and [`classes`]' weights; [`results`] looks up and creates outcomes;
//! [`broker`] holds the connection and its acknowledgements; [`cancel`], [`tokens`] and [`claim`] carry what
//! travels beside a job; [`identity`] tells jobs of one id apart; [`fault`] says what each failure means for a job;
//! [`provision`] makes streams and consumers;
//! [`store`] speaks S3, and [`args`] are its options. The crate knows no engine.

pub mod args;
pub mod broker;
pub mod cancel;
pub mod claim;
pub mod classes;
pub mod delivery;
pub mod fault;
pub mod identity;
pub mod monitor;
pub mod provision;
pub mod pull;
pub mod results;
pub mod store;
pub mod tokens;
