//! The job protocol over NATS JetStream, and the object store beside it: what worker, gateway and operator share.
//!
//! [`delivery`] pulls jobs by [`pull`]'s plan and [`classes`]' weights; [`results`] looks up and creates outcomes;
//! [`link`] holds the connection, by a [`login`]; [`broker`] asks and acknowledges over it; [`cancel`], [`tokens`] and
//! [`claim`] carry what travels beside a job; [`identity`] tells jobs of one id apart; [`fault`] says what each failure
//! means for a job; [`room`] bounds the bodies that are held; [`provision`] makes streams and consumers. Behind the
//! feature `s3`, [`store`] speaks S3, and [`args`] are its options: the operator does without. The crate knows no
//! engine.

#[cfg(feature = "s3")]
pub mod args;
pub mod broker;
pub mod cancel;
pub mod claim;
pub mod classes;
pub mod delivery;
pub mod fault;
pub mod identity;
pub mod link;
pub mod login;
pub mod monitor;
pub mod provision;
pub mod pull;
pub mod results;
pub mod room;
#[cfg(feature = "s3")]
pub mod store;
pub mod tokens;
