//! How many workers the backlog needs: deadlines against capacity.
//!
//! Each pending job must start within the wait target of its publication. The profile of arrivals tells how
//! many starts are due by when; what the ready, the starting and the new workers can start by then is set
//! against it. The least number of new workers that passes at every due time is the need. A worker is ordered
//! at the last moment at which it suffices: a backlog that still meets its target is let stand, because only
//! a worker with a backlog never idles.
//!
//! The test is the demand bound function of deadline scheduling (Baruah, Mok, Rosier 1990) on a fluid.

use super::inputs::{QueueReading, Reading, WorkerReading};
use super::memory::Memory;

/// Largest number that the search returns; bounds are applied later.
const REPLICAS_SEARCH_MAX: u32 = millrace_crds::scaling::REPLICAS_LIMIT;
/// A start that has taken this many times as long as usual is taken for lost: another worker may be ordered.
const LOST_AFTER: u64 = 3;
/// Points at which future arrivals are tested, besides the due times of the backlog.
const FUTURE_POINTS: u32 = 8;
/// An order that comes with its jobs is early enough when it leaves the new worker this share of the target.
/// Only those arrivals are foreseen for which it would leave less: a burst may end before it asks for more.
const ANSWER_SHARE: f64 = 0.5;
/// An order is put off while the same workers, ordered this much later, would still do: two periods of
/// the operator, so that one late decision breaks no deadline.
const PATIENCE_S: f64 = 4.0;
/// What is late whatever is ordered now is to start within this share of the target, or of a start where that is
/// longer, after the new workers are there. Less would buy little wait with many workers, each of which costs a start.
const GRACE_SHARE: f64 = 1.0 / 3.0;

/// Jobs that must have started by a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Due {
    /// Seconds from now; negative when overdue.
    pub in_s: f64,
    /// Jobs that must have started by then, in all.
    pub jobs: f64,
}

/// What is known about the work and the workers, as numbers for the test.
#[derive(Debug, Clone)]
pub struct Demand {
    /// The backlog by due time, in order.
    pub backlog: Vec<Due>,
    /// Jobs a second that come.
    pub arrival_rate: f64,
    /// Jobs a second that one worker finishes.
    pub rate: f64,
    /// Jobs that an empty worker takes at once.
    pub slots: f64,
    /// Wait target, in seconds.
    pub queue_wait_s: f64,
    /// Seconds until a new worker takes jobs.
    pub lead_s: f64,
    /// Workers that take jobs.
    pub ready: u32,
    /// Seconds until each starting worker takes jobs.
    pub starting_in_s: Vec<f64>,
}

impl Demand {
    /// Sets up the test with the deadline `queue_wait_s` after each arrival. Nothing without a measured rate.
    pub fn new(reading: &Reading, queue: &QueueReading, memory: &Memory, queue_wait_s: f64) -> Option<Self> {
        let lead_ms = memory.cold_start_p90_ms();
        // A start that takes longer than usual is still expected soon, but not at once.
        let overdue_ms = lead_ms / 10;
        let seen = !memory.cold_starts_ms.is_empty();
        let age_ms = |worker: &WorkerReading| reading.at_ms.saturating_sub(worker.created_ms);
        let lost = |worker: &WorkerReading| seen && age_ms(worker) > LOST_AFTER.saturating_mul(lead_ms);
        let left_ms = |worker: &WorkerReading| lead_ms.saturating_sub(age_ms(worker)).max(overdue_ms);
        let starting = reading.starting().filter(|&worker| !lost(worker)).map(left_ms);
        // Workers that were just asked for may have no pod yet.
        let seen_pods = reading.ready().chain(reading.starting()).count();
        let unseen = (reading.replicas as usize).saturating_sub(seen_pods).min(REPLICAS_SEARCH_MAX as usize);
        let starting = starting.chain(std::iter::repeat_n(lead_ms, unseen));
        Some(Self {
            backlog: profile(reading.at_ms, queue, memory, queue_wait_s),
            arrival_rate: memory.arrival_rate,
            rate: memory.rate()?,
            slots: memory.jobs_held_full,
            queue_wait_s,
            lead_s: lead_ms as f64 / 1e3,
            ready: reading.ready().count() as u32,
            starting_in_s: starting.map(|ms| ms as f64 / 1e3).collect(),
        })
    }

    /// New workers to order now: as many as would be needed if the order came a little later, rounded. For less
    /// than half a worker the order is put off, as what misses its deadline then misses it by little. None while
    /// nothing is pending: the workers that are there keep up, and the mean of arrivals outlives a burst.
    pub fn new_workers(&self) -> u32 {
        if self.backlog.is_empty() {
            return 0;
        }
        (self.needed(PATIENCE_S).round() as u32).min(REPLICAS_SEARCH_MAX)
    }

    /// New workers with which every deadline holds where new workers can still help, when they are ordered
    /// `delay_s` from now. A fraction: the last one's share of a worker.
    fn needed(&self, delay_s: f64) -> f64 {
        let soonest_s = self.lead_s + self.queue_wait_s.max(self.lead_s) * GRACE_SHARE;
        let most = |needed: f64, due: Due| {
            let at_s = due.in_s.max(soonest_s);
            let each = self.slots.max(1.0) + self.rate * (at_s - self.lead_s - delay_s).max(0.0);
            needed.max((due.jobs - self.started_by(at_s)) / each)
        };
        self.points().fold(0.0, most)
    }

    /// The workers, of so many, that are worth keeping when nothing is pending: those whom the arriving jobs
    /// keep busy all the time. The work of one that idles in part is saved up and done in one go.
    pub fn busy_workers(&self, of: u32) -> u32 {
        let mut keep = of;
        while keep > 0 && self.worth_stopping(keep - 1) {
            keep -= 1;
        }
        keep
    }

    /// Whether stopping the worker above `rest` pays: it would idle, and its restart takes no longer than
    /// the time until deadlines ask for it again.
    fn worth_stopping(&self, rest: u32) -> bool {
        let arriving = self.arrival_rate / self.rate;
        let growth = arriving - f64::from(rest);
        if growth >= 1.0 {
            return false;
        }
        // The oldest job is as old as the target when the backlog is one target's worth of arrivals.
        let needed_again_s = self.queue_wait_s * arriving / growth - self.lead_s;
        growth <= 0.0 || rest == 0 || needed_again_s >= self.lead_s
    }

    /// The due times to test: the backlog's, then those of the jobs that come too soon for an order of their own.
    fn points(&self) -> impl Iterator<Item = Due> + '_ {
        let pending = self.backlog.last().map_or(0.0, |due| due.jobs);
        let foreseen_s = (self.lead_s - self.queue_wait_s * ANSWER_SHARE).max(0.0);
        let future = (1..=FUTURE_POINTS).map(move |part| {
            let after_s = foreseen_s * f64::from(part) / f64::from(FUTURE_POINTS);
            Due { in_s: self.queue_wait_s + after_s, jobs: pending + self.arrival_rate * after_s }
        });
        self.backlog.iter().copied().chain(future)
    }

    /// Jobs that the workers of now and those on their way start by a time.
    fn started_by(&self, at_s: f64) -> f64 {
        let ready = f64::from(self.ready) * self.rate * at_s;
        let coming = self.starting_in_s.iter().filter(|&&in_s| in_s <= at_s);
        ready + coming.map(|in_s| self.slots + self.rate * (at_s - in_s)).sum::<f64>()
    }
}

/// The backlog by due time. What the profile of arrivals does not explain came before it was kept: such jobs
/// are as old as the oldest one.
fn profile(at_ms: u64, queue: &QueueReading, memory: &Memory, queue_wait_s: f64) -> Vec<Due> {
    let pending = queue.pending();
    let explained: u64 = memory.arrivals.iter().map(|step| step.jobs).sum();
    let in_s = |age_ms: u64| queue_wait_s - age_ms as f64 / 1e3;
    let mut jobs = pending.saturating_sub(explained);
    let mut backlog = Vec::with_capacity(memory.arrivals.len() + 1);
    if jobs > 0 {
        let first_ms = memory.arrivals.first().map_or(at_ms, |step| step.since_ms);
        let age_ms = queue.oldest_age_ms().unwrap_or(0).max(at_ms.saturating_sub(first_ms));
        backlog.push(Due { in_s: in_s(age_ms), jobs: jobs as f64 });
    }
    // The oldest step may have been pulled in part.
    let mut pulled = explained.saturating_sub(pending);
    for step in &memory.arrivals {
        jobs += step.jobs.saturating_sub(pulled);
        pulled = pulled.saturating_sub(step.jobs);
        backlog.push(Due { in_s: in_s(at_ms.saturating_sub(step.since_ms)), jobs: jobs as f64 });
    }
    backlog
}
