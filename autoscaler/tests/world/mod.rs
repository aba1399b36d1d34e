//! A small world around the autoscaler: pods that start, work, fail and drain, and a queue that they empty.

use std::collections::BTreeMap;

use millrace_autoscaler::{
    ClassReading, DecisionRecord, Memory, QueueReading, Reading, WorkerLoad, WorkerReading, WorkerState,
    decide,
};
use millrace_crds::names::Class;
use millrace_crds::scaling::ScalingSpec;

/// From a pod's creation until it takes jobs, and from a restart in place.
const START_MS: u64 = 25_000;
/// Longest time that a pod takes to go.
const DRAIN_MS: u64 = 30_000;
/// KV blocks of a worker; a job takes one.
const BLOCKS: u64 = 64;
/// The world's clock at the start: late enough for each step back.
const BEGIN_MS: u64 = 100_000_000;

/// What happens to a worker, by its place among those that there are, or to the operator's clock.
#[derive(Debug, Clone, Copy)]
pub enum Mishap {
    /// Nothing.
    None,
    /// A ready one is not for so many milliseconds; it goes on with its jobs.
    LosesReadiness(usize, u64),
    /// Its container starts anew in the same pod: its jobs and counters are gone.
    Restarts(usize),
    /// Its reports do not come for so many milliseconds.
    FallsSilent(usize, u64),
    /// Its pod is gone, and its jobs with it.
    Dies(usize),
    /// The operator's clock steps against the API server's.
    ClockSteps {
        /// By how much.
        by_ms: u64,
        /// Into the past.
        back: bool,
    },
}

/// The names of what may happen, as in [`Moment::happened`].
pub const HAPPENINGS: [&str; 6] =
    ["loses readiness", "restarts", "falls silent", "dies", "clock goes back", "clock goes ahead"];

/// What changes between two readings.
#[derive(Debug, Clone)]
pub struct Event {
    /// How much later it is.
    pub after_ms: u64,
    /// Jobs published.
    pub published: u64,
    /// Most jobs pulled.
    pub pulled: u64,
    /// Most jobs finished.
    pub finished: u64,
    /// Whether the queue can be read.
    pub readable: bool,
    /// Sequences that wait inside of each worker.
    pub waiting: u32,
    /// What else happens.
    pub mishap: Mishap,
}

/// A decision, and the truth at that moment.
#[derive(Debug, Clone)]
pub struct Moment {
    /// The decision with all that it was made from.
    pub record: DecisionRecord,
    /// Jobs that each pod holds which is not told to go.
    pub held: BTreeMap<String, u32>,
    /// The longest first start so far.
    pub longest_start_ms: u64,
    /// Steps of the clock so far.
    pub steps: u32,
    /// Which mishaps happened since the last moment.
    pub happened: Vec<&'static str>,
}

impl Moment {
    /// The operator's clock.
    pub fn at_ms(&self) -> u64 {
        self.record.decision.at_ms
    }

    /// The workers asked for before and after.
    pub fn change(&self) -> (u32, u32) {
        (self.record.decision.before, self.record.decision.replicas)
    }

    /// The queue, if it could be read.
    pub fn queue(&self) -> Option<&QueueReading> {
        self.record.reading.queue.as_ref()
    }
}

#[derive(Debug, Clone)]
struct Pod {
    name: String,
    state: WorkerState,
    created_ms: u64,
    /// When it becomes ready, or did last.
    ready_ms: u64,
    /// Whether it was ready once.
    started: bool,
    /// Whether its process runs and reports.
    runs: bool,
    silent_until_ms: u64,
    gone_at_ms: Option<u64>,
    held: u32,
    finished: u64,
}

impl Pod {
    fn new(number: u32, now_ms: u64) -> Self {
        Self {
            name: format!("w{number}"),
            state: WorkerState::Starting,
            created_ms: now_ms,
            ready_ms: now_ms + START_MS,
            started: false,
            runs: false,
            silent_until_ms: 0,
            gone_at_ms: None,
            held: 0,
            finished: 0,
        }
    }

    fn reading(&self, now_ms: u64, waiting: u32) -> WorkerReading {
        let load = WorkerLoad {
            jobs_held: self.held,
            sequences_waiting: waiting,
            kv_blocks_used: u64::from(self.held).min(BLOCKS),
            kv_blocks_total: BLOCKS,
            jobs_finished: self.finished,
        };
        WorkerReading {
            name: self.name.clone(),
            state: self.state,
            created_ms: self.created_ms,
            ready_ms: (self.state == WorkerState::Ready).then_some(self.ready_ms),
            load: (self.runs && now_ms >= self.silent_until_ms).then_some(load),
        }
    }
}

#[derive(Debug)]
struct World {
    now_ms: u64,
    /// The operator's clock is ahead by so much.
    ahead_ms: i64,
    steps: u32,
    pods: Vec<Pod>,
    made: u32,
    published: u64,
    pending: u64,
    /// Jobs of workers that are gone, until they come again.
    orphaned: u64,
    oldest_ms: u64,
    longest_start_ms: u64,
}

impl World {
    fn at_ms(&self) -> u64 {
        self.now_ms.saturating_add_signed(self.ahead_ms)
    }

    fn live(&mut self) -> Vec<&mut Pod> {
        self.pods.iter_mut().filter(|pod| pod.state != WorkerState::Draining).collect()
    }

    fn unacked(&self) -> u64 {
        self.orphaned + self.pods.iter().map(|pod| u64::from(pod.held)).sum::<u64>()
    }

    /// Does the mishap; its name if it happened to anybody.
    fn befall(&mut self, mishap: Mishap) -> Option<&'static str> {
        let now_ms = self.now_ms;
        let nth = |pods: usize, which: usize| which.checked_rem(pods);
        let mut live = self.live();
        match mishap {
            Mishap::None => None,
            Mishap::ClockSteps { by_ms, back } => {
                self.ahead_ms += if back { -(by_ms as i64) } else { by_ms as i64 };
                self.steps += 1;
                Some(if back { "clock goes back" } else { "clock goes ahead" })
            }
            Mishap::Dies(which) => {
                let at = nth(live.len(), which)?;
                let (name, held) = (live[at].name.clone(), live[at].held);
                self.orphaned += u64::from(held);
                self.pods.retain(|pod| pod.name != name);
                Some("dies")
            }
            Mishap::LosesReadiness(which, for_ms) => {
                live.retain(|pod| pod.state == WorkerState::Ready);
                let at = nth(live.len(), which)?;
                (live[at].state, live[at].ready_ms) = (WorkerState::Starting, now_ms + for_ms);
                Some("loses readiness")
            }
            Mishap::FallsSilent(which, for_ms) => {
                live.retain(|pod| pod.runs);
                let at = nth(live.len(), which)?;
                live[at].silent_until_ms = now_ms + for_ms;
                Some("falls silent")
            }
            Mishap::Restarts(which) => {
                live.retain(|pod| pod.started);
                let at = nth(live.len(), which)?;
                let pod = &mut *live[at];
                let held = std::mem::take(&mut pod.held);
                (pod.state, pod.ready_ms) = (WorkerState::Starting, now_ms + START_MS);
                (pod.runs, pod.finished) = (false, 0);
                self.orphaned += u64::from(held);
                Some("restarts")
            }
        }
    }

    /// Pods become ready, and those that have drained go.
    fn pass(&mut self) {
        let now_ms = self.now_ms;
        for pod in
            self.pods.iter_mut().filter(|pod| pod.state == WorkerState::Starting && pod.ready_ms <= now_ms)
        {
            (pod.state, pod.runs) = (WorkerState::Ready, true);
            if !std::mem::replace(&mut pod.started, true) {
                // It is seen at the first reading after; until then nobody knows that it is ready.
                pod.ready_ms = now_ms;
                self.longest_start_ms = self.longest_start_ms.max(now_ms - pod.created_ms);
            }
        }
        let over = |pod: &Pod| pod.gone_at_ms.is_some_and(|at_ms| pod.held == 0 || at_ms <= now_ms);
        self.orphaned += self.pods.iter().filter(|pod| over(pod)).map(|pod| u64::from(pod.held)).sum::<u64>();
        self.pods.retain(|pod| !over(pod));
    }

    /// Jobs are published, pulled by ready workers and finished by whoever holds them.
    fn work(&mut self, event: &Event) {
        (self.published, self.pending) = (self.published + event.published, self.pending + event.published);
        let mut left = event.finished;
        for pod in self.pods.iter_mut().filter(|pod| pod.runs) {
            let done = left.min(pod.held.into());
            left -= done;
            pod.held -= done as u32;
            pod.finished += done;
        }
        let mut ready: Vec<&mut Pod> =
            self.pods.iter_mut().filter(|pod| pod.state == WorkerState::Ready).collect();
        let workers = ready.len() as u64;
        let pulled = if workers == 0 { 0 } else { event.pulled.min(self.pending) };
        let again = if workers == 0 { 0 } else { std::mem::take(&mut self.orphaned) };
        for (at, pod) in ready.iter_mut().enumerate() {
            let share = (pulled + again) / workers + u64::from((at as u64) < (pulled + again) % workers);
            pod.held += share as u32;
        }
        if self.pending == 0 || pulled == self.pending {
            self.oldest_ms = self.now_ms;
        }
        self.pending -= pulled;
    }

    fn reading(&self, event: &Event, replicas: u32) -> Reading {
        let oldest_age_ms = (self.pending > 0).then_some(self.now_ms - self.oldest_ms);
        let (pending, unacked) = (self.pending, self.unacked());
        let class = ClassReading { class: Class::Normal, pending, unacked, oldest_age_ms };
        let queue = QueueReading { published: self.published, classes: vec![class] };
        Reading {
            at_ms: self.at_ms(),
            replicas,
            queue: event.readable.then_some(queue),
            workers: self.pods.iter().map(|pod| pod.reading(self.now_ms, event.waiting)).collect(),
        }
    }

    /// What a ReplicaSet does: it starts pods up to the number, and stops the marked ones down to it.
    fn follow(&mut self, replicas: u32, delete_first: &[String]) {
        let now_ms = self.now_ms;
        let surplus = self.live().len().saturating_sub(replicas as usize);
        let goes = &delete_first[..surplus.min(delete_first.len())];
        for pod in self.pods.iter_mut().filter(|pod| goes.contains(&pod.name)) {
            (pod.state, pod.gone_at_ms) = (WorkerState::Draining, Some(now_ms + DRAIN_MS));
        }
        while (self.live().len() as u32) < replicas {
            self.pods.push(Pod::new(self.made, now_ms));
            self.made += 1;
        }
    }
}

/// Plays a history, and returns each decision with the truth beside it.
pub fn play(spec: &ScalingSpec, events: &[Event]) -> Vec<Moment> {
    let mut world = World {
        now_ms: BEGIN_MS,
        ahead_ms: 0,
        steps: 0,
        pods: Vec::new(),
        made: 0,
        published: 0,
        pending: 0,
        orphaned: 0,
        oldest_ms: BEGIN_MS,
        longest_start_ms: 0,
    };
    let (mut memory, mut replicas) = (Memory::default(), spec.min_replicas);
    let mut moments = Vec::with_capacity(events.len());
    for event in events {
        world.now_ms += event.after_ms;
        let happened = world.befall(event.mishap).into_iter().collect();
        world.pass();
        world.work(event);
        let reading = world.reading(event, replicas);
        let held = world.live().iter().map(|pod| (pod.name.clone(), pod.held)).collect();
        let (decision, next) = decide(spec, &memory, &reading);
        replicas = decision.replicas;
        world.follow(replicas, &decision.delete_first);
        // What is known after this reading is what the record of the next one begins with.
        let record = DecisionRecord { spec: spec.clone(), memory, reading, decision };
        memory = next;
        let (longest_start_ms, steps) = (world.longest_start_ms, world.steps);
        moments.push(Moment { record, held, longest_start_ms, steps, happened });
    }
    moments
}
