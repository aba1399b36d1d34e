//! What the autoscaler has learned: how fast a worker is, how fast jobs come, how long a start takes.
//!
//! Bounded in size, whole as JSON, and a pure function of the readings so far. Fractions are kept to a
//! millionth, which JSON carries exactly, so that a decision can be derived again from its log.

use millrace_crds::scaling::{REPLICAS_LIMIT, ScalingSpec};
use serde::{Deserialize, Serialize};

use super::inputs::{QueueReading, Reading, WorkerReading};

/// The arrival rate is an exponential mean over this span, or over two starts where they take longer: long enough
/// that chance does not stop a worker whose restart costs as much as it saves, and short enough that the workers of
/// a burst do not outlive it by much.
const ARRIVAL_MEMORY_S: f64 = 60.0;
const ARRIVAL_MEMORY_STARTS: f64 = 2.0;
/// The rate of a worker forgets with this much busy time: several hundred jobs of common size.
const RATE_MEMORY_S: f64 = 600.0;
/// Busy time after which a measured rate is believed: a handful of jobs of common size.
const RATE_TRUST_S: f64 = 5.0;
/// Share of the jobs that it holds with a backlog from which on a worker counts as busy without one. Far below,
/// its jobs would run much faster than in full company.
const HALF_FULL: f64 = 0.5;
/// The profile of arrivals resolves the wait target into this many parts.
const ARRIVAL_PARTS: u64 = 32;
/// Most steps in the profile of arrivals; beyond, the two oldest are merged.
const ARRIVALS_MAX: usize = 64;
/// Cold starts remembered: enough for a 90th percentile that one outlier does not set.
const COLD_STARTS_MAX: usize = 20;
/// Lead time assumed before a start was seen.
const COLD_START_GUESS_MS: u64 = 30_000;
/// Longest gap between readings across which rates are learned; beyond, the operator was away.
const GAP_MAX_MS: u64 = 60_000;

/// What earlier readings and decisions left behind.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Memory {
    /// The last reading of the queue, in short.
    pub last: Option<LastReading>,
    /// When the jobs of the backlog came, oldest first.
    pub arrivals: Vec<Arrivals>,
    /// Jobs a second that come, as an exponential mean.
    pub arrival_rate: f64,
    /// Jobs finished by warm and busy workers, forgotten exponentially.
    pub jobs_finished: f64,
    /// The busy seconds that they took, forgotten likewise.
    pub busy_s: f64,
    /// Jobs that a busy worker holds at once.
    pub jobs_held_full: f64,
    /// The last starts, from the creation of the pod until ready, in milliseconds.
    pub cold_starts_ms: Vec<u64>,
    /// The workers that KV utilisation asked for, until a start's time after it asked last.
    pub kv_wanted: Option<Wanted>,
    /// When there was work last.
    pub work_seen_ms: Option<u64>,
    /// What was wanted, each entry valid until the next; for stabilisation.
    pub wanted: Vec<Wanted>,
    /// The changes made within the step window.
    pub changes: Vec<Change>,
}

/// The last reading of the queue, in short.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LastReading {
    /// When.
    pub at_ms: u64,
    /// Jobs published by then.
    pub published: u64,
    /// Jobs pending then.
    pub pending: u64,
    /// The workers that were ready by then.
    #[serde(default)]
    pub ready: Vec<String>,
    /// Jobs finished by each ready worker by then.
    pub finished: Vec<(String, u64)>,
}

/// Jobs that came within one step of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Arrivals {
    /// Start of the step: no job of it is older.
    pub since_ms: u64,
    /// How many.
    pub jobs: u64,
}

/// A number of workers that was wanted from a moment on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Wanted {
    /// Since when.
    pub at_ms: u64,
    /// How many.
    pub replicas: u32,
}

/// A change that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    /// When.
    pub at_ms: u64,
    /// Workers added, or removed when negative.
    pub by: i64,
}

/// A millionth is kept, the rest is dropped.
fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

impl Memory {
    /// Jobs a second that one busy worker finishes, once enough was seen to say so.
    pub fn rate(&self) -> Option<f64> {
        (self.busy_s >= RATE_TRUST_S && self.jobs_finished > 0.0).then(|| self.jobs_finished / self.busy_s)
    }

    /// How long a start takes: the 90th percentile of those seen, or a guess.
    pub fn cold_start_p90_ms(&self) -> u64 {
        let mut sorted = self.cold_starts_ms.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() * 9).div_ceil(10);
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(COLD_START_GUESS_MS)
    }

    /// What is known after this reading. An unreadable queue teaches nothing.
    pub fn learn(&self, spec: &ScalingSpec, reading: &Reading) -> Memory {
        let mut next = self.clone();
        next.learn_cold_starts(reading);
        let Some(queue) = &reading.queue else { return next };
        next.learn_arrivals(spec, reading.at_ms, queue);
        next.learn_rate(reading, queue);
        next.learn_kv(spec, reading);
        if queue.left() > 0 || next.work_seen_ms.is_none() {
            next.work_seen_ms = Some(reading.at_ms);
        }
        next.last = Some(LastReading {
            at_ms: reading.at_ms,
            published: queue.published,
            pending: queue.pending(),
            ready: reading.ready().map(|worker| worker.name.clone()).collect(),
            finished: reading.ready().filter_map(finished).collect(),
        });
        next
    }

    /// Takes in the starts that ended since the last reading. Names tell which: a pod's moments are whole seconds,
    /// so that by its clock a start may have ended before a reading that did not show it.
    fn learn_cold_starts(&mut self, reading: &Reading) {
        let started = reading.ready().filter(|worker| !self.was_ready(&worker.name));
        let took_ms = started.filter_map(|worker| Some(worker.ready_ms?.saturating_sub(worker.created_ms)));
        let took_ms: Vec<u64> = took_ms.collect();
        self.cold_starts_ms.extend(took_ms);
        let surplus = self.cold_starts_ms.len().saturating_sub(COLD_STARTS_MAX);
        self.cold_starts_ms.drain(..surplus);
    }

    fn was_ready(&self, name: &str) -> bool {
        self.last.as_ref().is_some_and(|last| last.ready.iter().any(|ready| ready == name))
    }

    /// Books the jobs published since the last reading, and forgets those that were pulled since.
    fn learn_arrivals(&mut self, spec: &ScalingSpec, at_ms: u64, queue: &QueueReading) {
        if let Some(last) = &self.last {
            let jobs = queue.published.saturating_sub(last.published);
            let elapsed_ms = at_ms.saturating_sub(last.at_ms);
            if (1..=GAP_MAX_MS).contains(&elapsed_ms) {
                let elapsed_s = elapsed_ms as f64 / 1e3;
                let starts_s = ARRIVAL_MEMORY_STARTS * self.cold_start_p90_ms() as f64 / 1e3;
                let kept = (-elapsed_s / ARRIVAL_MEMORY_S.max(starts_s)).exp();
                let seen = jobs as f64 / elapsed_s;
                self.arrival_rate = rounded(self.arrival_rate * kept + seen * (1.0 - kept));
            }
            let width_ms = (spec.targets.queue_wait.0.as_millis() as u64 / ARRIVAL_PARTS).max(1_000);
            match self.arrivals.last_mut() {
                Some(step) if last.at_ms.saturating_sub(step.since_ms) < width_ms => step.jobs += jobs,
                _ if jobs > 0 => self.arrivals.push(Arrivals { since_ms: last.at_ms, jobs }),
                _ => {}
            }
        }
        // Jobs leave in the order in which they came, so the backlog is what came last.
        let mut waiting = queue.pending();
        let of_the_backlog = self.arrivals.iter().rev().take_while(|step| {
            let some_wait = waiting > 0;
            waiting = waiting.saturating_sub(step.jobs);
            some_wait
        });
        let left = of_the_backlog.count();
        self.arrivals.drain(..self.arrivals.len() - left);
        while self.arrivals.len() > ARRIVALS_MAX {
            let oldest = self.arrivals.remove(0);
            if let Some(next) = self.arrivals.first_mut() {
                *next = Arrivals { since_ms: oldest.since_ms, jobs: next.jobs + oldest.jobs };
            }
        }
    }

    /// Measures what warm and busy workers finish. A worker is warm when it has finished as many jobs as it
    /// holds: before that, its first batch has not yet turned over. It is busy while there is a backlog, and
    /// without one while it is half full: else a wrong rate would stand as long as nothing waits.
    fn learn_rate(&mut self, reading: &Reading, queue: &QueueReading) {
        let Some(last) = &self.last else { return };
        let elapsed_ms = reading.at_ms.saturating_sub(last.at_ms);
        if !(1..=GAP_MAX_MS).contains(&elapsed_ms) {
            return;
        }
        let backlogged = last.pending > 0 && queue.pending() > 0;
        let (mut jobs, mut busy_s, mut held, mut warm) = (0.0, 0.0, 0.0, 0.0);
        for worker in reading.ready() {
            let (Some(load), Some(before)) = (worker.load, last.finished_by(&worker.name)) else { continue };
            let full = f64::from(load.jobs_held) / self.jobs_held_full.max(1.0);
            let busy = if backlogged { 1.0 } else { full.min(1.0) };
            let is_warm = before >= u64::from(load.jobs_held.max(1)) && load.jobs_finished >= before;
            if is_warm && busy >= HALF_FULL {
                jobs += (load.jobs_finished - before) as f64;
                busy_s += busy * elapsed_ms as f64 / 1e3;
                held += f64::from(load.jobs_held);
                warm += 1.0;
            }
        }
        if warm == 0.0 {
            return;
        }
        let kept = (-busy_s / RATE_MEMORY_S).exp();
        self.jobs_finished = rounded(self.jobs_finished * kept + jobs);
        self.busy_s = rounded(self.busy_s * kept + busy_s);
        if backlogged {
            // The mean may dip when a worker has just handed in a job; the fullest state is what counts.
            self.jobs_held_full = rounded((self.jobs_held_full * kept).max(held / warm));
        }
    }
}

impl Memory {
    /// Notes how many workers bring KV utilisation under its target while sequences wait for blocks. What was
    /// asked for stands until it can have come and helped; else it would be stopped before, and asked for again.
    fn learn_kv(&mut self, spec: &ScalingSpec, reading: &Reading) {
        let lead_ms = self.cold_start_p90_ms();
        self.kv_wanted = self.kv_wanted.filter(|w| reading.at_ms < w.at_ms.saturating_add(2 * lead_ms));
        let loads = || reading.ready().filter_map(|worker| worker.load.as_ref());
        let (used, total) = loads().fold((0u64, 0u64), |(used, total), load| {
            (used.saturating_add(load.kv_blocks_used), total.saturating_add(load.kv_blocks_total))
        });
        if total == 0 || loads().all(|load| load.sequences_waiting == 0) {
            return;
        }
        let one = total as f64 / loads().count() as f64;
        let needed = (used as f64 / (one * spec.targets.kv_utilization)).ceil() as u32;
        self.kv_wanted = Some(Wanted { at_ms: reading.at_ms, replicas: needed.min(REPLICAS_LIMIT) });
    }
}

impl LastReading {
    fn finished_by(&self, name: &str) -> Option<u64> {
        self.finished.iter().find(|(worker, _)| worker == name).map(|&(_, jobs)| jobs)
    }
}

fn finished(worker: &WorkerReading) -> Option<(String, u64)> {
    worker.load.map(|load| (worker.name.clone(), load.jobs_finished))
}
