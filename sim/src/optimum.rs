//! The clairvoyant optimum: the least GPU time with which the 95th percentile of the wait meets a target,
//! for one who knows every arrival.
//!
//! By Lagrangian duality. For a price on each late job, dynamic programming over (time, workers, backlog) finds
//! the cheapest plan; its cost less the price of the late jobs that are allowed is below the cost of every
//! plan that keeps the target (weak duality), and the best price gives the best bound.
//! Every simplification favours the optimum: work is a fluid that all workers share perfectly, even the last
//! job; a worker leaves at once, with no job to finish; its start is ordered in time for any need; jobs in a
//! worker's slots have started. What remains is what no rule can avoid: the work itself, cold starts of whole
//! workers, and deadlines in order of arrival. Time is cut into steps, so a worker may have to be there for up to a
//! step longer at either end than off the grid: its start is cheaper by these two steps.
//! One thing is taken for its mean and not for its worst case: the work that a worker's running jobs have left.
//! Twice as much would lower the bound by 1.4 % on the code trace, and by nothing on the conversation trace.
//!
//! The bound is over plans of some number of workers. Where the best plan uses more than half of them, the number is
//! doubled; beyond [`WORKERS_MAX`], more workers might be cheaper still, and there is no bound.
//! [`executed`] is the other side: what such a plan costs when it runs in the simulated cluster. The least that
//! clairvoyance could pay there lies between the two.

use super::cluster::{PolicyView, ScalingPolicy, SimOutcome, run};
use super::load::{Speed, Traffic};
use super::report::Row;

/// Share of the jobs that may be late.
pub const LATE_SHARE: f64 = 0.05;
/// Workers that a plan may use at first.
const WORKERS_FEW: usize = 12;
/// Workers that a plan may use at most.
pub const WORKERS_MAX: usize = 96;
/// States of all time steps together are kept below this number, by choice of the step.
const STATES_MAX: f64 = 25e6;
/// Waits to plan for, so that the plan keeps the whole wait when it runs.
const PLANNED_SHARES: [f64; 6] = [0.95, 0.9, 0.85, 0.8, 0.65, 0.5];
/// Prices of a late job between which the best is sought, in GPU seconds.
const PRICES_S: [f64; 2] = [0.02, 500.0];
/// Bounds that the search for the price computes.
const PRICES_TRIED: usize = 13;

/// The bound, and the plan behind it.
#[derive(Debug, Clone)]
pub struct Optimum {
    /// No plan that keeps the target costs less.
    pub gpu_s: f64,
    /// Workers over time, each entry valid until the next.
    pub replicas: Vec<(u64, u32)>,
    /// The plan's waits, by arrival, in milliseconds.
    pub waits_ms: Vec<u64>,
}

/// The problem on a grid: a step of time is as long as a unit of work, so a worker does one unit a step.
struct Grid {
    step_s: f64,
    steps: usize,
    levels: usize,
    /// Workers that a plan may use.
    workers_max: usize,
    /// Units that arrive in each step.
    arriving: Vec<usize>,
    /// Units that arrived by the end of each step.
    arrived: Vec<usize>,
    /// Jobs that arrived before each step, and in all.
    jobs_before: Vec<usize>,
    /// Jobs whose work begins before each unit.
    jobs_by_unit: Vec<usize>,
    /// Units that have started on a worker and are not done.
    in_service: f64,
    /// Steps from arrival to deadline.
    wait_steps: usize,
    /// A start in seconds, less what the grid adds to a worker's life.
    start_s: f64,
}

/// Finds the bound for a target of the 95th percentile; nothing where the best plan uses all workers there are.
pub fn optimum(load: &Traffic, speed: &Speed, wait_p95_s: f64) -> Option<Optimum> {
    let busy = load.work_s(speed) * 1e3 / load.length_ms.max(1) as f64;
    let mut workers_max = WORKERS_FEW;
    while (workers_max as f64) < 2.0 * busy {
        workers_max *= 2;
    }
    while workers_max <= WORKERS_MAX {
        let best = Grid::new(load, speed, wait_p95_s, workers_max).best(load);
        let most = |best: &Optimum| best.replicas.iter().map(|&(_, workers)| workers as usize).max();
        if let Some(best) = best.filter(|best| 2 * most(best).unwrap_or(0) <= workers_max) {
            return Some(best);
        }
        workers_max *= 2;
    }
    None
}

/// The other side of the bound: the cheapest of some plans that keeps the wait when it runs in the simulated
/// cluster, where a worker finishes its jobs before it leaves. Plans are made for ever shorter waits until one does.
pub fn executed(load: &Traffic, speed: &Speed, wait_p95_s: f64) -> anyhow::Result<Option<SimOutcome>> {
    let lead_ms = (speed.cold_start_s * 1e3) as u64;
    for share in PLANNED_SHARES {
        let Some(plan) = optimum(load, speed, wait_p95_s * share) else { break };
        let (replicas, ends_ms) = (&plan.replicas, load.length_ms);
        let outcome = run(load, speed, &mut Planned { replicas, lead_ms, ends_ms })?;
        if Row::new(load, "clairvoyant-run", &outcome).wait_p95_s <= wait_p95_s {
            return Ok(Some(outcome));
        }
    }
    Ok(None)
}

/// A plan as a policy. Each worker is ordered a start before the plan has it.
struct Planned<'a> {
    replicas: &'a [(u64, u32)],
    lead_ms: u64,
    ends_ms: u64,
}

impl ScalingPolicy for Planned<'_> {
    fn name(&self) -> String {
        "clairvoyant-run".into()
    }

    fn decide(&mut self, view: &PolicyView) -> (u32, Vec<u64>) {
        let planned =
            |at_ms: u64| self.replicas.iter().rev().find(|entry| entry.0 <= at_ms).map_or(0, |e| e.1);
        let soon = planned((view.now_ms + self.lead_ms).min(self.ends_ms - 1));
        // What the plan, a fluid, has done by its end and the cluster has not, the workers of its end do.
        let left = view.now_ms >= self.ends_ms && view.pending + view.unacked > 0;
        let now = planned(view.now_ms.min(self.ends_ms - 1));
        (now.max(soon).max(u32::from(left)), Vec::new())
    }
}

impl Grid {
    fn new(load: &Traffic, speed: &Speed, wait_s: f64, workers_max: usize) -> Self {
        let works: Vec<f64> = load.jobs.iter().map(|job| job.work_s(speed)).collect();
        let total_s: f64 = works.iter().sum();
        let mean_s = total_s / works.len().max(1) as f64;
        let square_s: f64 = works.iter().map(|w| w * w).sum::<f64>() / works.len().max(1) as f64;
        // What a busy slot has left is the mean residual life, which is longer than half for mixed sizes.
        let residual = (square_s / (2.0 * mean_s * mean_s)).max(1.0);
        let deepest_s = deepest(load, &works, 2.0 * wait_s + 60.0) + 1.5 * LATE_SHARE * total_s;
        let length_s = load.length_ms as f64 / 1e3;
        // As long as the number of states allows, and at least a second.
        let states = length_s * deepest_s * (workers_max + 1) as f64;
        let step_s = (states / STATES_MAX).sqrt().max(1.0);
        let steps = (length_s / step_s).ceil() as usize;
        let mut grid = Grid {
            step_s,
            steps,
            workers_max,
            levels: (deepest_s / step_s).ceil() as usize + 2,
            arriving: vec![0; steps],
            arrived: vec![0; steps],
            jobs_before: vec![0; steps + 1],
            jobs_by_unit: vec![0; (total_s / step_s) as usize + workers_max + 2],
            in_service: f64::from(speed.slots) * mean_s * residual / step_s,
            wait_steps: (wait_s / step_s).ceil() as usize,
            start_s: (speed.cold_start_s - 2.0 * step_s).max(0.0),
        };
        grid.fill(load, &works);
        grid
    }

    fn fill(&mut self, load: &Traffic, works: &[f64]) {
        let (mut job, mut done_s, mut before) = (0, 0.0, 0);
        let units = self.jobs_by_unit.len();
        let mut begins = vec![0usize; units];
        for step in 0..self.steps {
            self.jobs_before[step] = job;
            let end_ms = (step + 1) as f64 * self.step_s * 1e3;
            while load.jobs.get(job).is_some_and(|next| (next.at_ms as f64) < end_ms) {
                begins[((done_s / self.step_s) as usize).min(units - 1)] += 1;
                done_s += works[job];
                job += 1;
            }
            let arrived = (done_s / self.step_s) as usize;
            (self.arrived[step], self.arriving[step], before) = (arrived, arrived - before, arrived);
        }
        self.jobs_before[self.steps] = job;
        let mut jobs = 0;
        for (slot, begin) in self.jobs_by_unit.iter_mut().zip(begins) {
            *slot = jobs;
            jobs += begin;
        }
    }

    /// The best bound over the price of a late job, in which the bound is concave: golden-section search in the
    /// logarithm (Kiefer 1953). Then the plan at that price; none where the workers cannot do the work.
    fn best(&self, load: &Traffic) -> Option<Optimum> {
        let allowed = LATE_SHARE * load.jobs.len() as f64;
        let bound = |log: f64| self.plan(log.exp(), None) - log.exp() * allowed;
        let golden = (5f64.sqrt() - 1.0) / 2.0;
        let [mut low, mut high] = PRICES_S.map(f64::ln);
        let mut left = high - golden * (high - low);
        let mut right = low + golden * (high - low);
        let (mut at_left, mut at_right) = (bound(left), bound(right));
        for _ in 2..PRICES_TRIED {
            if at_left > at_right {
                (high, right, at_right) = (right, left, at_left);
                left = high - golden * (high - low);
                at_left = bound(left);
            } else {
                (low, left, at_left) = (left, right, at_right);
                right = low + golden * (high - low);
                at_right = bound(right);
            }
        }
        let (log, gpu_s) = if at_left > at_right { (left, at_left) } else { (right, at_right) };
        if !gpu_s.is_finite() {
            return None;
        }
        let mut choices = vec![0u8; self.steps * self.levels * (self.workers_max + 1)];
        self.plan(log.exp(), Some(&mut choices));
        let (replicas, waits_ms) = self.follow(load, &choices);
        Some(Optimum { gpu_s, replicas, waits_ms })
    }

    /// Jobs that have started by the end of a step.
    fn started(&self, step: usize, backlog: usize, workers: usize) -> usize {
        // One unit more than the grid says, so that rounding favours the optimum.
        let done = self.arrived[step].saturating_sub(backlog) as f64 + 1.0;
        let unit = (done + self.in_service * workers as f64).ceil() as usize + 1;
        self.jobs_by_unit[unit.min(self.jobs_by_unit.len() - 1)]
    }

    /// Jobs whose deadline is the end of this step and that have not started.
    fn late(&self, step: usize, backlog: usize, workers: usize) -> f64 {
        let Some(arrival) = step.checked_sub(self.wait_steps) else { return 0.0 };
        let (low, high) = (self.jobs_before[arrival], self.jobs_before[arrival + 1]);
        if low == high {
            return 0.0;
        }
        high.saturating_sub(self.started(step, backlog, workers).max(low)) as f64
    }

    /// The least cost with late jobs at a price, from no workers and no work; optionally the choices too.
    fn plan(&self, price_s: f64, mut choices: Option<&mut Vec<u8>>) -> f64 {
        let width = self.workers_max + 1;
        // What is left at the end is worked off by workers that are there.
        let mut after: Vec<f32> =
            (0..self.levels * width).map(|i| (i / width) as f32 * self.step_s as f32).collect();
        let mut now = vec![0f32; self.levels * width];
        let mut costs = vec![0f32; width];
        for step in (0..self.steps).rev() {
            for backlog in 0..self.levels {
                for (workers, cost) in costs.iter_mut().enumerate() {
                    let left = (backlog + self.arriving[step]).saturating_sub(workers);
                    *cost = if left >= self.levels {
                        f32::INFINITY
                    } else {
                        let late = self.late(step, left, workers) * price_s;
                        (workers as f64 * self.step_s + late) as f32 + after[left * width + workers]
                    };
                }
                let cells = backlog * width..(backlog + 1) * width;
                let picked = choices.as_mut().map(|all| {
                    let from = (step * self.levels + backlog) * width;
                    &mut all[from..from + width]
                });
                choose(&costs, self.start_s as f32, &mut now[cells], picked);
            }
            std::mem::swap(&mut after, &mut now);
        }
        f64::from(after[0])
    }

    /// Walks the choices from the start and reads off workers and waits.
    fn follow(&self, load: &Traffic, choices: &[u8]) -> (Vec<(u64, u32)>, Vec<u64>) {
        let (mut workers, mut backlog) = (0usize, 0usize);
        let mut replicas = Vec::new();
        let mut waits_ms = vec![0u64; load.jobs.len()];
        let mut started = 0;
        for step in 0..self.steps {
            let choice = choices[(step * self.levels + backlog) * (self.workers_max + 1) + workers] as usize;
            if choice != workers || step == 0 {
                replicas.push(((step as f64 * self.step_s * 1e3) as u64, choice as u32));
            }
            workers = choice;
            backlog = (backlog + self.arriving[step]).saturating_sub(workers);
            let end_ms = ((step + 1) as f64 * self.step_s * 1e3) as u64;
            let by_now = self.started(step, backlog, workers).min(self.jobs_before[step + 1]);
            let newly = load.jobs.iter().zip(&mut waits_ms).take(by_now).skip(started);
            for (job, wait_ms) in newly {
                *wait_ms = end_ms.saturating_sub(job.at_ms + (self.step_s * 1e3) as u64);
            }
            started = started.max(by_now);
        }
        replicas.push((load.length_ms, 0));
        (replicas, waits_ms)
    }
}

/// For each number of workers before, the cheapest number after: fewer are free, more cost a start each.
fn choose(costs: &[f32], start_s: f32, out: &mut [f32], mut picked: Option<&mut [u8]>) {
    let mut best = (f32::INFINITY, 0);
    for (workers, cost) in costs.iter().enumerate() {
        if *cost < best.0 {
            best = (*cost, workers);
        }
        out[workers] = best.0;
        if let Some(picked) = picked.as_mut() {
            picked[workers] = best.1 as u8;
        }
    }
    let mut best = (f32::INFINITY, 0);
    for (workers, cost) in costs.iter().enumerate().rev() {
        if best.0 - start_s * (workers as f32) < out[workers] {
            out[workers] = best.0 - start_s * workers as f32;
            if let Some(picked) = picked.as_mut() {
                picked[workers] = best.1 as u8;
            }
        }
        let with_start = *cost + start_s * workers as f32;
        if with_start < best.0 {
            best = (with_start, workers);
        }
    }
}

/// The most work that arrives within any span of this length.
fn deepest(load: &Traffic, works: &[f64], span_s: f64) -> f64 {
    let (mut first, mut sum, mut most) = (0, 0.0, 0.0f64);
    for (job, work_s) in load.jobs.iter().zip(works) {
        sum += work_s;
        while load.jobs[first].at_ms as f64 + span_s * 1e3 < job.at_ms as f64 {
            sum -= works[first];
            first += 1;
        }
        most = most.max(sum);
    }
    most
}
