//! Workers, a queue and virtual time.
//!
//! The queue is first in, first out. A worker takes jobs while it has a free slot; a job holds its slot for
//! `slots` times its work, so that a full worker does one second of work a second. A worker costs GPU time
//! from the creation of its pod until it is gone: a starting one goes at once, a ready one after its jobs.
//! Every job runs exactly once, whatever the policy does.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::load::{Speed, Traffic};

/// Virtual time between two looks of a policy.
pub const TICK_MS: u64 = 1_000;
/// A run that has not finished its jobs by then is broken off: a policy that never starts a worker.
const RUN_MS_MAX: u64 = 7 * 86_400_000;
/// Most workers of a run.
pub const REPLICAS_MAX: u32 = 64;

/// One worker of the simulation.
#[derive(Debug, Clone)]
pub struct SimWorker {
    /// Unique in the run; larger is younger.
    pub id: u64,
    /// When its pod was created.
    pub created_ms: u64,
    /// When it takes its first job.
    pub ready_ms: u64,
    /// Told to go.
    pub draining: bool,
    /// Jobs held.
    pub held: u32,
    /// Jobs finished.
    pub finished: u64,
}

/// What a policy sees.
#[derive(Debug)]
pub struct PolicyView<'a> {
    /// The clock.
    pub now_ms: u64,
    /// Workers asked for.
    pub replicas: u32,
    /// Jobs published.
    pub published: u64,
    /// Jobs that wait.
    pub pending: u64,
    /// Jobs that run.
    pub unacked: u64,
    /// Age of the oldest job that waits.
    pub oldest_age_ms: Option<u64>,
    /// The workers, draining ones too.
    pub workers: &'a [SimWorker],
    /// Jobs that a worker holds at most.
    pub slots: u32,
}

/// A rule that sets the number of workers.
pub trait ScalingPolicy {
    /// A short name.
    fn name(&self) -> String;
    /// The number of workers from now on, and which to remove first; the rest are removed as Kubernetes
    /// would: those that start, then the youngest.
    fn decide(&mut self, view: &PolicyView) -> (u32, Vec<u64>);
}

/// What came of a run.
#[derive(Debug, Clone, Default)]
pub struct SimOutcome {
    /// The wait of each job, by arrival, in milliseconds.
    pub waits_ms: Vec<u64>,
    /// What the workers cost, in milliseconds.
    pub gpu_ms: u64,
    /// Of that, the time in which workers started.
    pub starting_ms: u64,
    /// Of that, the share of the time of workers that drained in which slots were empty.
    pub draining_ms: u64,
    /// Of that, the time in which workers that were ready and stayed held no job.
    pub empty_ms: u64,
    /// Of that, the work itself.
    pub working_ms: u64,
    /// Changes of the number of workers.
    pub scale_events: u64,
    /// Workers started.
    pub starts: u64,
    /// The number of workers asked for, each entry valid until the next.
    pub replicas: Vec<(u64, u32)>,
}

/// A run: a load, workers, a clock.
struct Run<'a> {
    load: &'a Traffic,
    speed: &'a Speed,
    now_ms: u64,
    /// Jobs published; those from `started` on wait.
    published: usize,
    started: usize,
    finished: usize,
    workers: Vec<SimWorker>,
    /// When which worker finishes a job.
    finishes: BinaryHeap<Reverse<(u64, u64)>>,
    next_id: u64,
    outcome: SimOutcome,
}

/// Runs a load under a policy until every job is done and the load is over.
pub fn run(load: &Traffic, speed: &Speed, policy: &mut dyn ScalingPolicy) -> anyhow::Result<SimOutcome> {
    let mut run = Run {
        load,
        speed,
        now_ms: 0,
        published: 0,
        started: 0,
        finished: 0,
        workers: Vec::new(),
        finishes: BinaryHeap::new(),
        next_id: 0,
        outcome: SimOutcome::default(),
    };
    run.outcome.waits_ms.reserve(load.jobs.len());
    let mut replicas = 0;
    while run.finished < load.jobs.len() || run.now_ms < load.length_ms {
        anyhow::ensure!(
            run.now_ms < RUN_MS_MAX,
            "{} left {} of {} jobs undone after a week",
            policy.name(),
            load.jobs.len() - run.finished,
            load.jobs.len()
        );
        let (wanted, first) = policy.decide(&run.view(replicas));
        let wanted = wanted.min(REPLICAS_MAX);
        if wanted != replicas || run.now_ms == 0 {
            run.outcome.scale_events += u64::from(wanted != replicas);
            run.outcome.replicas.push((run.now_ms, wanted));
            run.scale(replicas, wanted, &first);
            replicas = wanted;
        }
        run.advance(run.now_ms + TICK_MS);
    }
    for worker in std::mem::take(&mut run.workers) {
        run.outcome.gpu_ms += run.now_ms - worker.created_ms;
        if !worker.draining {
            run.outcome.starting_ms += run.now_ms.min(worker.ready_ms) - worker.created_ms;
        }
    }
    // A job's share of its worker is one slot.
    run.outcome.working_ms /= u64::from(speed.slots.max(1));
    run.outcome.replicas.push((run.now_ms, 0));
    Ok(run.outcome)
}

impl Run<'_> {
    fn view(&self, replicas: u32) -> PolicyView<'_> {
        let waiting = self.load.jobs[self.started..self.published].first();
        PolicyView {
            now_ms: self.now_ms,
            replicas,
            published: self.published as u64,
            pending: (self.published - self.started) as u64,
            unacked: (self.started - self.finished) as u64,
            oldest_age_ms: waiting.map(|job| self.now_ms - job.at_ms),
            workers: &self.workers,
            slots: self.speed.slots,
        }
    }

    /// Adds or removes workers.
    fn scale(&mut self, before: u32, wanted: u32, first: &[u64]) {
        for _ in before..wanted {
            let ready_ms = self.now_ms + (self.speed.cold_start_s * 1e3) as u64;
            let id = self.next_id;
            let (created_ms, draining) = (self.now_ms, false);
            self.workers.push(SimWorker { id, created_ms, ready_ms, draining, held: 0, finished: 0 });
            self.next_id += 1;
            self.outcome.starts += 1;
        }
        for _ in wanted..before {
            let now_ms = self.now_ms;
            let live = self.workers.iter_mut().filter(|worker| !worker.draining);
            let rank = |worker: &SimWorker| {
                let named = first.iter().position(|&id| id == worker.id).unwrap_or(usize::MAX);
                (named, worker.ready_ms <= now_ms, Reverse(worker.id))
            };
            if let Some(worker) = live.min_by_key(|worker| rank(worker)) {
                worker.draining = true;
                let id = worker.id;
                self.outcome.starting_ms += now_ms.min(worker.ready_ms) - worker.created_ms;
                self.outcome.draining_ms += self.drain_waste_ms(id);
            }
        }
        self.release_drained();
    }

    /// What the slots of a worker that is told to go will idle until its last job is done.
    fn drain_waste_ms(&self, id: u64) -> u64 {
        let left = self.finishes.iter().filter(|Reverse((_, worker))| *worker == id);
        let left_ms: Vec<u64> = left.map(|Reverse((at_ms, _))| at_ms - self.now_ms).collect();
        let last_ms = left_ms.iter().max().copied().unwrap_or(0);
        last_ms.saturating_sub(left_ms.iter().sum::<u64>() / u64::from(self.speed.slots.max(1)))
    }

    /// Lets go of the workers that drain and hold nothing.
    fn release_drained(&mut self) {
        let now_ms = self.now_ms;
        let outcome = &mut self.outcome;
        self.workers.retain(|worker| {
            let gone = worker.draining && worker.held == 0;
            if gone {
                outcome.gpu_ms += now_ms - worker.created_ms;
            }
            !gone
        });
    }

    /// Plays arrivals, finishes and workers that become ready, in their order, up to a time.
    fn advance(&mut self, until_ms: u64) {
        // A worker may become ready exactly now.
        self.start();
        loop {
            let arrival = self.load.jobs.get(self.published).map(|job| job.at_ms);
            let finish = self.finishes.peek().map(|&Reverse((at_ms, _))| at_ms);
            let now_ms = self.now_ms;
            let ready =
                self.workers.iter().map(|worker| worker.ready_ms).filter(|&at_ms| at_ms > now_ms).min();
            let next = [arrival, finish, ready].into_iter().flatten().min();
            let Some(at_ms) = next.filter(|&at_ms| at_ms < until_ms) else { break };
            self.pass(at_ms.max(now_ms));
            while self.load.jobs.get(self.published).is_some_and(|job| job.at_ms <= self.now_ms) {
                self.published += 1;
            }
            while let Some(&Reverse((at_ms, id))) = self.finishes.peek() {
                if at_ms > self.now_ms {
                    break;
                }
                self.finishes.pop();
                self.finish(id);
            }
            self.start();
        }
        self.pass(until_ms);
    }

    /// Lets time pass until the next event.
    fn pass(&mut self, until_ms: u64) {
        let now_ms = self.now_ms;
        let empty = |worker: &&SimWorker| !worker.draining && worker.held == 0 && worker.ready_ms <= now_ms;
        let empty = self.workers.iter().filter(empty).count() as u64;
        self.outcome.empty_ms += empty * (until_ms - now_ms);
        self.now_ms = until_ms;
    }

    fn finish(&mut self, id: u64) {
        self.finished += 1;
        let Some(worker) = self.workers.iter_mut().find(|worker| worker.id == id) else { return };
        worker.held -= 1;
        worker.finished += 1;
        if worker.draining && worker.held == 0 {
            self.release_drained();
        }
    }

    /// Gives waiting jobs to the workers with the most free slots.
    fn start(&mut self) {
        let (now_ms, slots) = (self.now_ms, self.speed.slots);
        while self.started < self.published {
            let takes = |worker: &&mut SimWorker| {
                !worker.draining && worker.ready_ms <= now_ms && worker.held < slots
            };
            let free = self.workers.iter_mut().filter(takes).min_by_key(|worker| (worker.held, worker.id));
            let Some(worker) = free else { return };
            let job = &self.load.jobs[self.started];
            worker.held += 1;
            let service_ms = (job.work_s(self.speed) * f64::from(slots) * 1e3).ceil() as u64;
            self.outcome.working_ms += service_ms.max(1);
            self.finishes.push(Reverse((now_ms + service_ms.max(1), worker.id)));
            self.outcome.waits_ms.push(now_ms - job.at_ms);
            self.started += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::load::SimJob;
    use super::*;

    /// Always as many workers.
    struct Fixed(u32);

    impl ScalingPolicy for Fixed {
        fn name(&self) -> String {
            "fixed".into()
        }

        fn decide(&mut self, _: &PolicyView) -> (u32, Vec<u64>) {
            (self.0, Vec::new())
        }
    }

    #[test]
    fn a_second_is_a_start_or_work_or_empty_or_partly_full() {
        // Two workers of two slots start for 10 s. A job of 5 s of work then holds one slot of one for 10 s.
        let speed =
            Speed { prompt_tokens_per_s: 100.0, output_tokens_per_s: 100.0, slots: 2, cold_start_s: 10.0 };
        let jobs = vec![SimJob { at_ms: 50_000, prompt_tokens: 500, output_tokens: 0 }];
        let load = Traffic { name: "one".into(), jobs, length_ms: 100_000, queue_wait_s: 60 };
        let outcome = run(&load, &speed, &mut Fixed(2)).expect("the job is done");
        assert_eq!((outcome.gpu_ms, outcome.starting_ms, outcome.working_ms), (200_000, 20_000, 5_000));
        assert_eq!(outcome.empty_ms, 90_000 + 80_000);
    }
}
