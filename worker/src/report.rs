//! The load report: once a second on core NATS, for the autoscaler and whoever watches.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use millrace_crds::load::{LoadReport, Phase};
use millrace_crds::names::{ModelRef, SubjectToken};
use millrace_engine::schedule::handle::{EngineHandle, EngineLoad};
use millrace_queue::broker::Broker;
use tokio::time::MissedTickBehavior;

use crate::health::Health;
use crate::metrics::WorkerMetrics;

/// Pause between two reports.
const PERIOD: Duration = Duration::from_secs(1);

/// What the worker is doing, set by whoever knows. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct CurrentPhase(Arc<AtomicU8>);

const PHASES: [Phase; 4] = [Phase::Pulling, Phase::Loading, Phase::Ready, Phase::Draining];

impl CurrentPhase {
    /// Enters a phase.
    pub fn set(&self, phase: Phase) {
        let index = PHASES.iter().position(|&p| p == phase).unwrap_or(0);
        self.0.store(u8::try_from(index).unwrap_or(0), Ordering::Relaxed);
    }

    /// The phase now.
    pub fn get(&self) -> Phase {
        PHASES[usize::from(self.0.load(Ordering::Relaxed)) % PHASES.len()]
    }
}

/// Who reports, and from what.
#[derive(Debug)]
pub struct Reporter {
    /// The connection.
    pub broker: Broker,
    /// The model that is served.
    pub model: ModelRef,
    /// This worker.
    pub worker: SubjectToken,
    /// Counters.
    pub metrics: Arc<WorkerMetrics>,
    /// What it is doing.
    pub phase: CurrentPhase,
    /// When the process started.
    pub started: Instant,
    /// Where the engine and the durations of its start are, once there are any.
    pub health: Health,
}

/// The counters of which a report gives the rates.
#[derive(Debug, Clone, Copy)]
struct Seen {
    at: Instant,
    prompt_tokens: u64,
    output_tokens: u64,
}

impl Seen {
    fn now(load: Option<&EngineLoad>) -> Self {
        let get = |pick: fn(&EngineLoad) -> &AtomicU64| load.map_or(0, |load| EngineLoad::get(pick(load)));
        Self {
            at: Instant::now(),
            prompt_tokens: get(|load| &load.prompt_tokens),
            output_tokens: get(|load| &load.output_tokens),
        }
    }
}

impl Reporter {
    /// Reports until dropped, first at once.
    pub async fn run(self) {
        let subject = self.model.load_subject(&self.worker);
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before = Seen::now(self.health.engine().map(EngineHandle::load));
        loop {
            ticks.tick().await;
            let now = Seen::now(self.health.engine().map(EngineHandle::load));
            let report = self.report((before, now));
            before = now;
            let body = serde_json::to_vec(&report).expect("numbers and strings serialise");
            // While the broker is away, reports would only pile up in the client.
            if self.broker.connected() {
                let _ = self.broker.client().publish(subject.clone(), body.into()).await;
            }
        }
    }

    fn report(&self, (before, now): (Seen, Seen)) -> LoadReport {
        let engine = self.health.engine();
        let get = |pick: fn(&EngineLoad) -> &AtomicU64| {
            engine.map_or(0, |engine| EngineLoad::get(pick(engine.load())))
        };
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        let rate = |before: u64, now: u64| match seconds > 0.0 {
            true => now.saturating_sub(before) as f64 / seconds,
            false => 0.0,
        };
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        LoadReport {
            worker: self.worker.clone(),
            phase: self.phase.get(),
            uptime_s: self.started.elapsed().as_secs_f64(),
            kv_blocks_used: get(|load| &load.kv_blocks_used),
            kv_blocks_total: engine.map_or(0, |engine| engine.limits().kv_blocks.into()),
            sequences_running: small(get(|load| &load.running)),
            sequences_waiting: small(get(|load| &load.waiting)),
            jobs_held: u32::try_from(self.metrics.held.get()).unwrap_or(0),
            prompt_tokens_per_s: rate(before.prompt_tokens, now.prompt_tokens),
            output_tokens_per_s: rate(before.output_tokens, now.output_tokens),
            jobs_finished: self.metrics.stored_total(),
            model_digest: self.health.model_digest(),
            cold_start: self.health.cold_start(),
        }
    }
}
