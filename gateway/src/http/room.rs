//! How full the queues are: a request is told before the broker has to refuse its job.
//!
//! Jobs of lower classes are refused earlier, so that a bulk of them leaves room for what is urgent. What is known is
//! at most a few seconds old, and is read beside the requests: none of them waits for it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::jetstream::Context;
use async_nats::jetstream::response::Response;
use millrace_crds::names::{Class, ModelRef};
use serde::Deserialize;

use crate::http::error::{ApiCode, ApiError};

/// How long a look at a queue is believed before the next one.
const FRESH: Duration = Duration::from_secs(1);
/// How long it is used when no look succeeds.
const STALE_MAX: Duration = Duration::from_secs(10);
/// How long a look may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// Most queues that are looked at.
const MODELS_MAX: usize = 4096;

/// How full a queue may be for a job of this class.
fn full_at(class: Class) -> f64 {
    match class {
        Class::High => 0.99,
        Class::Normal => 0.95,
        Class::Low => 0.90,
    }
}

#[derive(Debug, Deserialize)]
struct Info {
    config: Bounds,
    state: Fill,
}

#[derive(Debug, Deserialize)]
struct Bounds {
    max_msgs: i64,
    max_bytes: i64,
}

#[derive(Debug, Deserialize)]
struct Fill {
    messages: u64,
    bytes: u64,
}

impl Info {
    /// The part that is full, of jobs or of bytes.
    fn part(&self) -> f64 {
        let of = |fill: u64, bound: i64| if bound > 0 { fill as f64 / bound as f64 } else { 0.0 };
        of(self.state.messages, self.config.max_msgs).max(of(self.state.bytes, self.config.max_bytes))
    }
}

#[derive(Debug, Default)]
struct Known {
    part: f64,
    at: Option<Instant>,
    tried_at: Option<Instant>,
}

/// The queues, as far as jobs go into them.
#[derive(Debug)]
pub struct QueueRoom {
    jetstream: Context,
    known: Mutex<HashMap<ModelRef, Known>>,
}

impl QueueRoom {
    /// Of this broker.
    pub fn new(jetstream: Context) -> Arc<Self> {
        Arc::new(Self { jetstream, known: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ModelRef, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is room for a job.
    ///
    /// # Errors
    /// [`ApiCode::QueueFull`].
    pub fn check(self: &Arc<Self>, model: &ModelRef, class: Class) -> Result<(), ApiError> {
        let part = {
            let mut known = self.lock();
            if known.len() >= MODELS_MAX && !known.contains_key(model) {
                known.retain(|_, one| one.tried_at.is_some_and(|at| at.elapsed() < STALE_MAX));
            }
            let one = known.entry(model.clone()).or_default();
            if one.tried_at.is_none_or(|at| at.elapsed() >= FRESH) {
                one.tried_at = Some(Instant::now());
                tokio::spawn(self.clone().look(model.clone()));
            }
            one.at.filter(|at| at.elapsed() < STALE_MAX).map_or(0.0, |_| one.part)
        };
        if part < full_at(class) {
            return Ok(());
        }
        let message = format!(
            "the queue of model {} is {:.0} % full; jobs of class {class} are taken below {:.0} %",
            model.name,
            part * 100.0,
            full_at(class) * 100.0
        );
        Err(ApiError::new(ApiCode::QueueFull, message))
    }

    async fn look(self: Arc<Self>, model: ModelRef) {
        let subject = format!("STREAM.INFO.{}", model.jobs_stream());
        let asking = self.jetstream.request(subject, &());
        let answer = tokio::time::timeout(LOOK_TIMEOUT, asking).await;
        let part = match answer {
            Ok(Ok(Response::Ok::<Info>(info))) => info.part(),
            _ => return tracing::warn!(%model, "how full the queue is cannot be read"),
        };
        if let Some(known) = self.lock().get_mut(&model) {
            (known.part, known.at) = (part, Some(Instant::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_or_bytes_fill_a_queue() {
        let info = |messages, bytes, max_msgs, max_bytes| Info {
            config: Bounds { max_msgs, max_bytes },
            state: Fill { messages, bytes },
        };
        assert_eq!(info(5, 0, 10, 1000).part(), 0.5);
        assert_eq!(info(5, 900, 10, 1000).part(), 0.9);
        assert_eq!(info(5, 900, -1, -1).part(), 0.0, "without bounds");
    }

    #[test]
    fn what_is_urgent_finds_room_last() {
        assert!(
            full_at(Class::Low) < full_at(Class::Normal) && full_at(Class::Normal) < full_at(Class::High)
        );
    }
}
