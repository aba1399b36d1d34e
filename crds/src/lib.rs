//! The contracts of Millrace, shared by operator, worker, gateway and tests.
//!
//! Here are the names on the wire ([`names`]), behind the feature `nats` the streams and consumers under them
//! (`streams`) and where real ones differ (`drift`), a job's headers ([`job`]), the OpenAI forms inside of it
//! ([`request`]), the ledger of its attempts ([`attempts`]), its one outcome ([`result`]), its token deltas
//! ([`tokens`]), the worker's load report ([`load`]), the bounds and targets of scaling ([`scaling`]), the worker's
//! configuration ([`config`]), what each role may do at the broker ([`permissions`]), what a check found ([`check`])
//! and, behind the feature `kube`, the custom resource (`model`).
//! Nothing in this crate does input or output.

pub mod attempts;
pub mod backlog;
pub mod check;
pub mod config;
#[cfg(feature = "nats")]
pub mod drift;
pub mod job;
pub mod load;
#[cfg(feature = "kube")]
pub mod model;
pub mod names;
pub mod permissions;
pub mod request;
pub mod result;
pub mod scaling;
#[cfg(feature = "nats")]
pub mod streams;
pub mod tokens;
pub mod units;
