//! What to ask the broker for, and when: the state of the pull requests of one worker. Pure.
//!
//! There is at most one request a class in flight. A class that may hold jobs is *asked*: it answers at
//! once, with as many jobs as it has up to its share of the free slots, or with "none". A class that said
//! "none" is *watched*: a request for one job waits at the broker until a job comes. So an idle worker
//! wakes at once, a busy one never waits for an empty class, and what is asked for never exceeds the free
//! slots; only a watched class may add its one job to a worker that has filled up since.
//!
//! Slots that fall to a class whose request is in flight are kept for its next one. So the classes' shares
//! follow their weights however fast each of them is answered, and a slot is idle for one answer at most.
//!
//! A worker without a free slot for all may have some for the higher classes: these are then asked or watched alone.
//!
//! Errors are paced: after each one the class rests, for longer with every error in a row.

use std::time::{Duration, Instant};

use millrace_crds::config::ClassWeights;
use millrace_crds::names::Class;
use millrace_crds::streams::PULL_BATCH_MAX;

use crate::classes::{PerClass, Turns};

/// How long the broker keeps a watching request. Short, because a worker that filled up meanwhile should
/// not keep a job from an idle one for longer.
pub const WATCH_EXPIRES: Duration = Duration::from_secs(5);
/// How often the broker says that it still knows a watching request.
pub const WATCH_HEARTBEAT: Duration = Duration::from_secs(2);
/// An asking request without an answer for this long is lost.
const ASK_TIMEOUT: Duration = Duration::from_secs(5);
/// A watching request without a sign of life for this long is lost.
const WATCH_TIMEOUT: Duration = Duration::from_secs(6);
/// Rest after the first error of a class; doubled for each further one.
const REST_MIN: Duration = Duration::from_millis(100);
/// Longest rest: a broker that is back is used within this time.
const REST_MAX: Duration = Duration::from_secs(3);
/// Errors in a row after which a class counts as failing: a change of the broker's leader takes fewer.
const FAILING_AFTER: u32 = 3;
/// Errors in a row after which the subscription is made anew.
pub const REBUILD_AFTER: u32 = 5;

/// One request to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PullRequest {
    /// Which class's consumer is asked.
    pub class: Class,
    /// The request's number; the broker's status messages name it.
    pub number: u64,
    /// Most jobs.
    pub batch: usize,
    /// Whether it waits for a job, for at most [`WATCH_EXPIRES`].
    pub watch: bool,
}

/// What the broker says about a request, other than jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It still waits (100).
    Alive,
    /// It is over: there are no (more) jobs, or its time is up (404, 408).
    Over,
    /// It failed: no consumer, leader change, too many requests (409, 503, others).
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing is known of the class; it may hold jobs.
    Unknown,
    /// It held no more jobs when last asked.
    Empty,
    /// A request is in flight until the moment when it counts as lost.
    InFlight { number: u64, left: usize, watch: bool, lost_at: Instant },
    /// Nothing is asked until then.
    Resting { until: Instant },
}

/// The pull requests of one worker.
#[derive(Debug)]
pub struct PullPlan {
    turns: Turns,
    phases: PerClass<Phase>,
    /// Slots that fell to a class and were not asked for yet.
    kept: PerClass<usize>,
    errors: PerClass<u32>,
    number: u64,
}

impl PullPlan {
    /// Nothing was asked yet.
    pub fn new(weights: &ClassWeights) -> Self {
        Self {
            turns: Turns::new(weights),
            phases: [Phase::Unknown; Class::ALL.len()],
            kept: [0; Class::ALL.len()],
            errors: [0; Class::ALL.len()],
            number: 0,
        }
    }

    /// The requests to send now, given the worker's free slots for each class: those of a lower class are among those
    /// of a higher one.
    pub fn plan(&mut self, free: PerClass<usize>, now: Instant) -> Vec<PullRequest> {
        self.expire(now);
        let asked: usize = self.phases.iter().map(|phase| phase.asked()).sum();
        let free = free.map(|free| free.saturating_sub(asked).min(PULL_BATCH_MAX as usize));
        match free[Class::Low as usize] {
            0 => self.plan_higher(free, now),
            for_all => self.plan_all(for_all, now),
        }
    }

    /// The classes that have slots, higher ones first: each is asked for all that are left of its own, or watched.
    fn plan_higher(&mut self, free: PerClass<usize>, now: Instant) -> Vec<PullRequest> {
        let (mut requests, mut taken) = (Vec::new(), 0);
        for class in Class::ALL {
            let batch = free[class as usize].saturating_sub(taken);
            match self.phases[class as usize] {
                Phase::Unknown if batch > 0 => {
                    taken += batch;
                    requests.push(self.send(class, batch, false, now));
                }
                Phase::Empty if batch > 0 => requests.push(self.send(class, 1, true, now)),
                _ => {}
            }
        }
        requests
    }

    /// Each class by its share.
    fn plan_all(&mut self, mut free: usize, now: Instant) -> Vec<PullRequest> {
        self.share(free);
        let mut requests = Vec::new();
        for class in Class::ALL {
            let batch = self.kept[class as usize].min(free);
            match self.phases[class as usize] {
                Phase::Unknown if batch > 0 => {
                    self.kept[class as usize] = 0;
                    free -= batch;
                    requests.push(self.send(class, batch, false, now));
                }
                Phase::Empty => requests.push(self.send(class, 1, true, now)),
                _ => {}
            }
        }
        requests
    }

    /// Shares the free slots that are not kept yet among the classes that may hold jobs.
    fn share(&mut self, free: usize) {
        let candidates = self.phases.map(Phase::may_hold_jobs);
        for class in Class::ALL {
            if !candidates[class as usize] {
                self.kept[class as usize] = 0;
            }
        }
        let kept: usize = self.kept.iter().sum();
        let shares = self.turns.share(free.saturating_sub(kept), candidates);
        for class in Class::ALL {
            self.kept[class as usize] += shares[class as usize];
        }
    }

    fn send(&mut self, class: Class, batch: usize, watch: bool, now: Instant) -> PullRequest {
        self.number += 1;
        let lost_at = now + if watch { WATCH_TIMEOUT } else { ASK_TIMEOUT };
        self.phases[class as usize] = Phase::InFlight { number: self.number, left: batch, watch, lost_at };
        PullRequest { class, number: self.number, batch, watch }
    }

    /// A job of the class arrived.
    pub fn delivered(&mut self, class: Class, now: Instant) {
        self.errors[class as usize] = 0;
        let phase = &mut self.phases[class as usize];
        match phase {
            // It was watched: there may be more where this one came from.
            Phase::InFlight { left: 0 | 1, .. } => *phase = Phase::Unknown,
            Phase::InFlight { left, lost_at, .. } => {
                *left -= 1;
                *lost_at = now + ASK_TIMEOUT;
            }
            // An answer to a request that counted as lost.
            Phase::Unknown | Phase::Empty | Phase::Resting { .. } => {}
        }
    }

    /// The broker said something about a request.
    pub fn status(&mut self, class: Class, number: u64, status: Status, now: Instant) {
        let phase = self.phases[class as usize];
        let Phase::InFlight { number: current, left, watch, .. } = phase else { return };
        if current != number {
            return;
        }
        self.phases[class as usize] = match status {
            Status::Alive => Phase::InFlight { number, left, watch, lost_at: now + WATCH_TIMEOUT },
            // A watch that ran out says that the class is still empty.
            Status::Over => {
                self.errors[class as usize] = 0;
                Phase::Empty
            }
            Status::Failed => self.rest(class, now),
        };
    }

    /// The connection was made anew: what was in flight is gone.
    pub fn reconnected(&mut self) {
        self.phases = [Phase::Unknown; Class::ALL.len()];
        self.kept = [0; Class::ALL.len()];
        self.errors = [0; Class::ALL.len()];
    }

    /// Whether there were so many errors in a row that the subscription should be made anew. Asking clears.
    pub fn take_rebuild(&mut self) -> bool {
        let due = self.errors.iter().any(|&errors| errors > 0 && errors.is_multiple_of(REBUILD_AFTER))
            && self.phases.iter().all(|phase| !matches!(phase, Phase::InFlight { .. }));
        if due {
            self.errors = self.errors.map(|errors| if errors == 0 { 0 } else { errors + 1 });
        }
        due
    }

    /// Classes whose requests have failed `FAILING_AFTER` times or more in a row.
    pub fn failing(&self) -> PerClass<bool> {
        self.errors.map(|errors| errors >= FAILING_AFTER)
    }

    /// When [`PullPlan::plan`] should be asked again even if nothing happens.
    pub fn wake_at(&self) -> Option<Instant> {
        let times = self.phases.iter().filter_map(|phase| match phase {
            Phase::InFlight { lost_at, .. } => Some(*lost_at),
            Phase::Resting { until } => Some(*until),
            Phase::Unknown | Phase::Empty => None,
        });
        times.min()
    }

    /// Takes requests that got no answer in time for lost, and ends rests. After it [`PullPlan::wake_at`] lies ahead.
    pub fn expire(&mut self, now: Instant) {
        for class in Class::ALL {
            match self.phases[class as usize] {
                Phase::InFlight { lost_at, .. } if now >= lost_at => {
                    self.phases[class as usize] = self.rest(class, now);
                }
                Phase::Resting { until } if now >= until => self.phases[class as usize] = Phase::Unknown,
                _ => {}
            }
        }
    }

    fn rest(&mut self, class: Class, now: Instant) -> Phase {
        let errors = &mut self.errors[class as usize];
        let rest = REST_MIN.saturating_mul(1 << (*errors).min(10)).min(REST_MAX);
        *errors = errors.saturating_add(1);
        Phase::Resting { until: now + rest }
    }
}

impl Phase {
    fn may_hold_jobs(self) -> bool {
        matches!(self, Phase::Unknown | Phase::InFlight { watch: false, .. })
    }

    fn asked(self) -> usize {
        match self {
            Phase::InFlight { left, watch: false, .. } => left,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plan() -> PullPlan {
        PullPlan::new(&ClassWeights { high: 2, normal: 1, low: 1 })
    }

    /// Nobody asks while the broker is away: the driver's clock alone must not find itself in the past again and again.
    #[test]
    fn without_asking_the_clock_runs_out() {
        let mut plan = plan();
        let mut now = Instant::now();
        assert_eq!(plan.plan([6; 3], now).len(), 3);
        let mut wakes = 0;
        while let Some(at) = plan.wake_at() {
            assert!(at > now, "it would turn without a pause");
            now = at;
            plan.expire(now);
            wakes += 1;
        }
        assert!((2..=6).contains(&wakes), "a loss and a rest for each class: {wakes}");
    }

    #[test]
    fn asks_by_weight_then_watches_what_is_empty() {
        let now = Instant::now();
        let mut plan = plan();
        let asked = plan.plan([8; 3], now);
        assert_eq!(asked.iter().map(|r| r.batch).collect::<Vec<_>>(), [4, 2, 2]);
        assert!(asked.iter().all(|r| !r.watch));
        assert!(plan.plan([8; 3], now).is_empty(), "all slots are asked for");
        for request in &asked {
            plan.status(request.class, request.number, Status::Over, now);
        }
        let watched = plan.plan([8; 3], now);
        assert!(watched.iter().all(|r| r.watch && r.batch == 1) && watched.len() == 3);
        // A job on a watched class: ask that class for more at once, with all that is free.
        plan.delivered(Class::Low, now);
        let asked = plan.plan([7; 3], now);
        assert_eq!((asked.len(), asked[0].class, asked[0].batch, asked[0].watch), (1, Class::Low, 7, false));
    }

    #[test]
    fn nothing_is_asked_without_a_free_slot() {
        assert!(plan().plan([0; 3], Instant::now()).is_empty());
    }

    #[test]
    fn a_worker_that_is_full_for_lower_classes_asks_for_higher_ones() {
        let now = Instant::now();
        let mut plan = plan();
        let asked = plan.plan([5, 2, 0], now);
        assert_eq!((asked.len(), asked[0].class, asked[0].batch, asked[0].watch), (1, Class::High, 5, false));
        plan.status(Class::High, asked[0].number, Status::Over, now);
        let next = plan.plan([5, 2, 0], now);
        let next: Vec<_> = next.iter().map(|request| (request.class, request.batch, request.watch)).collect();
        assert_eq!(next, [(Class::High, 1, true), (Class::Normal, 2, false)]);
        assert!(plan.plan([5, 2, 0], now).is_empty(), "the two of it are among the five");
    }

    #[test]
    fn errors_are_paced_and_end() {
        let mut now = Instant::now();
        let mut plan = plan();
        let mut sent = 0;
        let mut rebuilt = 0;
        for _ in 0..600 {
            for request in plan.plan([4; 3], now) {
                sent += 1;
                plan.status(request.class, request.number, Status::Failed, now);
            }
            rebuilt += usize::from(plan.take_rebuild());
            now += Duration::from_millis(100);
        }
        // A minute of failures: a few requests a class, then one each REST_MAX.
        assert!((45..100).contains(&sent), "{sent} requests in a minute");
        assert!(rebuilt > 2, "{rebuilt}");
        assert_eq!(plan.failing(), [true; 3]);
        now += REST_MAX;
        let requests = plan.plan([4; 3], now);
        assert_eq!(requests.len(), 3, "the broker is back");
        plan.delivered(requests[0].class, now);
        assert_eq!(plan.errors[requests[0].class as usize], 0);
        assert_eq!(plan.failing(), [false, true, true]);
    }

    #[test]
    fn lost_requests_are_noticed() {
        let now = Instant::now();
        let mut plan = plan();
        let asked = plan.plan([4; 3], now);
        assert_eq!(plan.wake_at(), Some(now + ASK_TIMEOUT));
        let later = now + ASK_TIMEOUT;
        assert!(plan.plan([4; 3], later).is_empty(), "it rests first");
        // A late status of the lost request changes nothing.
        plan.status(asked[0].class, asked[0].number, Status::Over, later);
        assert_eq!(plan.plan([4; 3], later + REST_MIN).len(), 3);
        plan.reconnected();
        assert_eq!(plan.plan([4; 3], later + REST_MIN).len(), 3);
    }

    proptest! {
        /// While every class holds jobs, what was asked for one is its weight's share of all that was asked
        /// for, to within a worker's slots, whichever class the broker answers first.
        #[test]
        fn shares_do_not_depend_on_who_is_answered_first(
            answers in prop::collection::vec((0usize..3, 1usize..8), 200..400),
        ) {
            let now = Instant::now();
            let mut plan = PullPlan::new(&ClassWeights { high: 4, normal: 2, low: 1 });
            let slots = 7;
            let mut running = 0;
            let mut asked = [0usize; 3];
            let mut unanswered = [0usize; 3];
            for (class, jobs) in answers {
                for request in plan.plan([slots - running; 3], now) {
                    asked[request.class as usize] += request.batch;
                    unanswered[request.class as usize] += request.batch;
                }
                let jobs = jobs.min(unanswered[class]);
                for _ in 0..jobs {
                    plan.delivered(Class::ALL[class], now);
                }
                unanswered[class] -= jobs;
                // Some of what runs ends: all of it, when nothing else could happen.
                let room = slots - unanswered.iter().sum::<usize>();
                running = if jobs == 0 { 0 } else { (running + jobs).min(room) / 2 };
                let fair = asked.iter().sum::<usize>() as f64 / 7.0;
                for (asked, weight) in asked.iter().zip([4.0, 2.0, 1.0]) {
                    let off = *asked as f64 - weight * fair;
                    prop_assert!(off.abs() <= 2.0 * slots as f64, "{asked} asked at weight {weight}, off by {off}");
                }
            }
        }

        /// Over any course of events, the jobs asked for never exceed the free slots.
        #[test]
        fn never_asks_for_more_than_is_free(
            events in prop::collection::vec((0usize..3, 0u8..6, 0usize..20, 0usize..4), 1..300),
        ) {
            let mut now = Instant::now();
            let mut plan = plan();
            let mut numbers = [0; 3];
            for (class, event, free, extra) in events {
                now += Duration::from_millis(50);
                plan.expire(now);
                let asked: usize = plan.phases.iter().map(|phase| phase.asked()).sum();
                let requests = plan.plan([free + extra, free + extra, free], now);
                let more: usize = requests.iter().filter(|r| !r.watch).map(|r| r.batch).sum();
                let low: usize = requests.iter().filter(|r| !r.watch && r.class == Class::Low).map(|r| r.batch).sum();
                prop_assert!(low == 0 || asked + low <= free, "{asked} + {low} > {free}");
                let free = free + extra;
                prop_assert!(requests.is_empty() || asked + more <= free, "{asked} + {more} > {free}");
                for request in requests {
                    prop_assert!(request.batch > 0);
                    numbers[request.class as usize] = request.number;
                }
                let (class, number) = (Class::ALL[class], numbers[class]);
                match event {
                    0 => plan.delivered(class, now),
                    1 => plan.status(class, number, Status::Over, now),
                    2 => plan.status(class, number, Status::Failed, now),
                    3 => plan.status(class, number, Status::Alive, now),
                    4 => plan.reconnected(),
                    _ => {}
                }
            }
        }
    }
}
