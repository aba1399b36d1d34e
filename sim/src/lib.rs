//! The simulation that judges the autoscaler: traffic replayed in virtual time.
//!
//! A [`Load`](load::Traffic) of jobs meets a [`cluster`] of workers whose number a policy sets: the autoscaler's
//! own [`decide`](millrace_autoscaler::decide), KEDA's JetStream rule under the HPA's behaviour, the HPA's rule on
//! utilisation, or the [`optimum`] of one who knows the future. Nothing here reads a clock or draws a random
//! number that is not seeded.

pub mod cluster;
pub mod compare;
pub mod hindsight;
pub mod hpa;
pub mod keda;
pub mod load;
pub mod millrace;
pub mod optimum;
pub mod plot;
pub mod report;
pub mod sweep;
pub mod tune;
