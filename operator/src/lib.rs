//! The operator of Millrace: from an InferenceModel to its queue and its workers.
//!
//! One reconcile is a straight line: [`fetch`] (reads) -> [`validate`] (pure) -> [`millrace_autoscaler`] (pure)
//! -> [`build`] (pure) -> [`apply`] (writes) -> [`status`] (pure, and one write). [`queue`] is the only file that
//! creates streams and consumers; [`apply`], [`status`] and [`lease`] are the only ones that write to the API server.
//! [`controller`] drives the line for each model, on every change and by the clock. [`load`] and [`wake`]
//! listen to the broker beside it.
//!
//! The operator may not panic: one bad model must not stop the others.

#![cfg_attr(
    not(test),
    deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)
)]

pub mod apply;
pub mod build;
pub mod caches;
pub mod config;
pub mod controller;
pub mod error;
pub mod fetch;
pub mod finalize;
pub mod lease;
pub mod load;
pub mod metrics;
pub mod names;
pub mod network;
pub mod pod_monitors;
pub mod pod_template;
pub mod queue;
pub mod scaling;
pub mod server;
// It runs in a program of its own, for whom an end with a message is as good.
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
pub mod status;
pub mod telemetry;
pub mod validate;
pub mod wake;
pub mod worker_config;
pub mod workers;
