//! How many workers the backlog needs: deadlines against capacity.
//!
//! Each pending job must start within the wait target of its publication. The profile of arrivals tells how
//! many starts are due by when; what the ready, the starting and the new workers can start by then is set
//! against it. The least number of new workers that passes at every due time is the demand: a backlog that
//! meets its target is let stand, because only a worker with a backlog never idles.
//!
//! The test is the demand bound function of deadline scheduling (Baruah, Mok, Rosier 1990) on a fluid.

use super::inputs::{QueueReading, Reading};
use super::memory::Memory;

/// Largest number that the search returns; bounds are applied later.
const REPLICAS_SEARCH_MAX: u32 = millrace_crds::scaling::REPLICAS_LIMIT;
/// Points at which future arrivals are tested, besides the due times of the backlog.
const FUTURE_POINTS: u32 = 8;

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
        let starting = reading.starting().map(|worker| {
            let age_ms = reading.at_ms.saturating_sub(worker.created_ms);
            lead_ms.saturating_sub(age_ms).max(overdue_ms) as f64 / 1e3
        });
        Some(Self {
            backlog: profile(reading.at_ms, queue, memory, queue_wait_s),
            arrival_rate: memory.arrival_rate,
            rate: memory.rate()?,
            slots: memory.jobs_held_full,
            queue_wait_s,
            lead_s: lead_ms as f64 / 1e3,
            ready: reading.ready().count() as u32,
            starting_in_s: starting.collect(),
        })
    }

    /// Workers whose work the arriving jobs are.
    pub fn arriving_workers(&self) -> f64 {
        self.arrival_rate / self.rate
    }

    /// New workers needed so that every deadline up to the horizon holds, where new workers can still help.
    pub fn new_workers(&self, horizon_s: f64) -> u32 {
        // What is due before a new worker is there is asked of it soon after it came.
        let soonest_s = self.lead_s + self.queue_wait_s / 4.0;
        let mut needed = 0.0f64;
        for due in self.points(horizon_s) {
            let at_s = due.in_s.max(soonest_s);
            let missing = due.jobs - self.started_by(at_s);
            if missing > 0.0 {
                needed = needed.max(missing / (self.slots + self.rate * (at_s - self.lead_s)));
            }
        }
        (needed.ceil() as u32).min(REPLICAS_SEARCH_MAX)
    }

    /// Whether the deadlines up to the horizon hold with this many ready workers and none starting.
    pub fn holds_with(&self, ready: u32, horizon_s: f64) -> bool {
        self.points(horizon_s).all(|due| due.jobs <= f64::from(ready) * self.rate * due.in_s.max(0.0))
    }

    /// The due times to test: the backlog's, then the future's.
    fn points(&self, horizon_s: f64) -> impl Iterator<Item = Due> + '_ {
        let pending = self.backlog.last().map_or(0.0, |due| due.jobs);
        let future_s = (horizon_s - self.queue_wait_s).max(0.0);
        let future = (1..=FUTURE_POINTS).map(move |part| {
            let after_s = future_s * f64::from(part) / f64::from(FUTURE_POINTS);
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
