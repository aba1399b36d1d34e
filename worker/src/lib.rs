//! The queue worker: job in, one durable result out, over its own inference engine.
//!
//! A job's way is a straight line; the README's map names the files in the order in which it travels.

pub mod batch;
pub mod bench;
pub mod broker;
pub mod cancel;
pub mod capacity;
pub mod claim;
pub mod classes;
pub mod completion;
pub mod config;
pub mod detokenize;
pub mod engine;
pub mod failpoint;
pub mod fault;
pub mod generate;
pub mod health;
pub mod import;
pub mod job;
pub mod load;
pub mod memory;
pub mod metrics;
pub mod model;
pub mod monitor;
pub mod prompt;
pub mod provision;
pub mod pull;
pub mod queue;
pub mod report;
pub mod results;
pub mod run;
pub mod serve;
pub mod start;
pub mod stop;
pub mod store;
pub mod telemetry;
pub mod template;
pub mod tokens;
pub mod watchdog;
pub mod weights;
pub mod worker;
