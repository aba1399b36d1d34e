//! The serving line: everything that a job passes on its way, made once a worker.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use millrace_crds::config::QueueConfig;
use millrace_crds::names::{ModelRef, SubjectToken};
use millrace_engine::schedule::handle::EngineLoad;
use millrace_queue::broker::Broker;
use millrace_queue::cancel::Cancels;
use millrace_queue::claim::Claims;
use millrace_queue::classes::PerClass;
use millrace_queue::delivery::PullTrouble;
use millrace_queue::results::Results;
use millrace_queue::tokens::Tokens;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::cohorts::Cohorts;
use super::holds::Holds;
use crate::broken::Broken;
use crate::capacity::Capacity;
use crate::metrics::WorkerMetrics;
use crate::run::Run;
use crate::watchdog::Watch;

/// Everything that a job passes on its way. One a worker.
#[derive(Debug)]
pub struct ServingLine<R> {
    /// The engine's side.
    pub run: R,
    /// The connection.
    pub broker: Broker,
    /// The model that is served.
    pub model: ModelRef,
    /// Outcomes.
    pub results: Results,
    /// Token deltas.
    pub tokens: Tokens,
    /// Cancellations.
    pub cancels: Cancels,
    /// Claim checks.
    pub claims: Claims,
    /// Counters.
    pub metrics: Arc<WorkerMetrics>,
    /// What the watchdog sees.
    pub watch: Watch,
    /// Why no job can be pulled, if none can.
    pub trouble: PullTrouble,
    /// The queue's settings.
    pub queue: QueueConfig,
    /// Jobs that ended here since the start.
    pub finished: AtomicU64,
    pub(super) holds: Holds,
    pub(super) cohorts: Cohorts,
    pub(super) capacity: std::sync::Mutex<Capacity>,
    pub(super) freed: Notify,
    pub(super) drain_over: CancellationToken,
    /// Whether the process must end.
    pub broken: Broken,
}

/// What a line is made from.
#[derive(Debug)]
pub struct LineParts<R> {
    /// The engine's side.
    pub run: R,
    /// The connection.
    pub broker: Broker,
    /// The model that is served.
    pub model: ModelRef,
    /// This worker.
    pub worker: SubjectToken,
    /// Digest of the model's files.
    pub digest: String,
    /// The queue's settings.
    pub queue: QueueConfig,
    /// How long outcomes live.
    pub outcome_ttl: Duration,
    /// Claim checks.
    pub claims: Claims,
    /// Counters.
    pub metrics: Arc<WorkerMetrics>,
    /// What the watchdog sees.
    pub watch: Watch,
    /// Where it is said why no job can be pulled.
    pub trouble: PullTrouble,
    /// Whether the process must end.
    pub broken: Broken,
}

impl<R: Run> ServingLine<R> {
    /// A line that holds no job yet.
    pub fn new(parts: LineParts<R>) -> Arc<Self> {
        let LineParts { run, broker, model, worker, digest, queue, outcome_ttl, .. } = parts;
        let LineParts { claims, metrics, watch, trouble, broken, .. } = parts;
        let capacity = Capacity::new(run.limits()).into();
        Arc::new(Self {
            results: Results::new(broker.clone(), model.clone(), worker, digest, outcome_ttl),
            tokens: Tokens::new(broker.clone(), model.clone()),
            cancels: Cancels::default(),
            finished: AtomicU64::new(0),
            holds: Holds::default(),
            cohorts: Cohorts::default(),
            freed: Notify::new(),
            drain_over: CancellationToken::new(),
            capacity,
            run,
            broker,
            model,
            claims,
            metrics,
            watch,
            trouble,
            broken,
            queue,
        })
    }

    /// Jobs of each class that may be pulled.
    pub(super) fn free_slots(&self) -> PerClass<usize> {
        let waiting = self.run.load().waiting_by_class.each_ref().map(EngineLoad::get);
        let capacity = self.capacity.lock().unwrap_or_else(PoisonError::into_inner);
        capacity.free(self.holds.by_class(), waiting)
    }
}
