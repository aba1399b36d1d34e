//! Keep-alives: a held job stays ours only while the engine moves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use millrace_crds::names::JobId;
use millrace_queue::cancel::Cancel;
use millrace_queue::delivery::Delivery;
use tokio::time::{Instant, MissedTickBehavior};

use super::ServingLine;
use crate::run::Run;

/// Keep-alives per ack wait.
const BEATS: u32 = 3;
/// Shortest pause between them.
const PAUSE_MIN: Duration = Duration::from_millis(50);

/// What holds a job up at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldBy {
    /// Requests to broker and object store; each of them has a time limit of its own.
    Settling,
    /// The engine, or others in it: only its steps are a sign of life.
    Engine,
}

/// One job's phase, shared by its steps and its keep-alives.
#[derive(Debug, Clone, Default)]
pub struct Pulse(Arc<AtomicBool>);

impl Pulse {
    /// The job enters a phase.
    pub fn set(&self, phase: HeldBy) {
        self.0.store(phase == HeldBy::Engine, Ordering::Relaxed);
    }

    fn needs_steps(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Keeps a delivery alive while its job makes progress, and looks for its cancel marker as often, because a
/// cancellation said while the connection was down was not heard. Never returns.
pub async fn keep_alive<R: Run>(
    line: &ServingLine<R>,
    delivery: &Delivery,
    (job, cancel): (&JobId, &Cancel),
    pulse: &Pulse,
) {
    let pause = (line.queue.ack_wait.0 / BEATS).max(PAUSE_MIN);
    let mut beats = tokio::time::interval_at(Instant::now() + pause, pause);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let steps = || line.run.load().steps.load(Ordering::Relaxed);
    let mut seen = steps();
    loop {
        beats.tick().await;
        let now = steps();
        let moved = now != seen;
        seen = now;
        // Where no job is in the engine, its silence is no sign of anything.
        if moved || !pulse.needs_steps() || line.watch.busy() == 0 {
            delivery.keep_alive().await;
        } else {
            line.metrics.keep_alives_withheld.inc();
            tracing::warn!(job = %job, steps = now, "no step since the last keep-alive; withholding this one");
        }
        if line.results.cancelled(job).await == Ok(true) {
            cancel.set();
        }
    }
}
