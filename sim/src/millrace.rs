//! The autoscaler itself as a policy: readings are made from the view, and [`decide`] does the rest.

use millrace_autoscaler::{
    ClassReading, DecisionRecord, Memory, QueueReading, Reading, WorkerLoad, WorkerReading, WorkerState,
    decide,
};
use millrace_crds::names::Class;
use millrace_crds::scaling::ScalingSpec;

use super::cluster::{PolicyView, ScalingPolicy, SimWorker};

/// Time between two decisions.
pub const PERIOD_MS: u64 = 2_000;
/// KV blocks of a simulated worker.
const KV_BLOCKS: u64 = 1_000;
/// KV blocks that one job of a full worker takes: a full worker uses 80 % of them.
const KV_SHARE: f64 = 0.8;

/// The autoscaler with a spec.
#[derive(Debug, Clone)]
pub struct Millrace {
    spec: ScalingSpec,
    memory: Memory,
    /// The decisions that changed something, when they are asked for.
    pub records: Option<Vec<DecisionRecord>>,
}

impl Millrace {
    /// A model that was just created: nothing is known about its workers.
    pub fn new(spec: ScalingSpec) -> Self {
        Self { spec, memory: Memory::default(), records: None }
    }
}

impl ScalingPolicy for Millrace {
    fn name(&self) -> String {
        "millrace".into()
    }

    fn decide(&mut self, view: &PolicyView) -> (u32, Vec<u64>) {
        if !view.now_ms.is_multiple_of(PERIOD_MS) {
            return (view.replicas, Vec::new());
        }
        let reading = reading(view);
        let (decision, memory) = decide(&self.spec, &self.memory, &reading);
        let (replicas, before) = (decision.replicas, decision.before);
        let first = decision.delete_first.iter().filter_map(|name| name.parse().ok()).collect();
        if let (Some(records), true) = (&mut self.records, replicas != before) {
            let (spec, memory) = (self.spec.clone(), self.memory.clone());
            records.push(DecisionRecord { spec, memory, reading, decision });
        }
        self.memory = memory;
        (replicas, first)
    }
}

fn reading(view: &PolicyView) -> Reading {
    let (pending, unacked, oldest_age_ms) = (view.pending, view.unacked, view.oldest_age_ms);
    let class = ClassReading { class: Class::Normal, pending, unacked, oldest_age_ms };
    Reading {
        at_ms: view.now_ms,
        replicas: view.replicas,
        queue: Some(QueueReading { published: view.published, classes: vec![class] }),
        workers: view.workers.iter().map(|worker| worker_reading(view, worker)).collect(),
    }
}

fn worker_reading(view: &PolicyView, worker: &SimWorker) -> WorkerReading {
    let ready = worker.ready_ms <= view.now_ms;
    let full = f64::from(worker.held) / f64::from(view.slots);
    WorkerReading {
        name: worker.id.to_string(),
        state: match (worker.draining, ready) {
            (true, _) => WorkerState::Draining,
            (false, true) => WorkerState::Ready,
            (false, false) => WorkerState::Starting,
        },
        created_ms: worker.created_ms,
        ready_ms: ready.then_some(worker.ready_ms),
        load: ready.then_some(WorkerLoad {
            jobs_held: worker.held,
            sequences_waiting: 0,
            kv_blocks_used: (full * KV_SHARE * KV_BLOCKS as f64) as u64,
            kv_blocks_total: KV_BLOCKS,
            jobs_finished: worker.finished,
        }),
    }
}
