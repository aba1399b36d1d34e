//! The queue worker: jobs from `millrace_queue` through `millrace_engine`, one durable outcome each.
//!
//! [`worker`] starts everything; [`serve`] takes a job through its eight steps; [`run`] is where queue and engine
//! meet. [`batch`], [`bench`] and [`perplexity`] run the engine without a queue; [`import`] and [`check`] are about
//! model folders.

pub mod batch;
pub mod bench;
pub mod broken;
pub mod capacity;
pub mod check;
pub mod config;
pub mod ending;
pub mod failpoint;
pub mod health;
pub mod import;
pub mod load;
pub mod metrics;
pub mod perplexity;
pub mod report;
pub mod run;
pub mod serve;
pub mod telemetry;
pub mod watchdog;
pub mod weights;
pub mod worker;
