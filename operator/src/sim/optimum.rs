//! The clairvoyant optimum: the least GPU time with which the 95th percentile of the wait meets a target,
//! for one who knows every arrival.
//!
//! By Lagrangian duality. For a price on each late job, dynamic programming over (time, workers, backlog) finds
//! the cheapest plan; its cost less the price of the late jobs that are allowed is below the cost of every
//! plan that keeps the target (weak duality), and the best price gives the best bound.
//! Every simplification favours the optimum: work is a fluid that all workers share perfectly, even the last
//! job; a worker leaves at once, with no job to finish; its start is ordered in time for any need; jobs in a
//! worker's slots have started. What remains is what no rule can avoid: the work itself, cold starts of whole
//! workers, and deadlines in order of arrival.
//!
//! The bound is over plans of at most [`WORKERS_MAX`] workers, on a grid of time whose step grows with the size
//! of the load. Where the best plan meets that limit, more workers might be cheaper still: there is no bound.

use super::load::{Load, Speed};

/// Share of the jobs that may be late.
pub const LATE_SHARE: f64 = 0.05;
/// Workers that a plan may use.
pub const WORKERS_MAX: usize = 48;
/// States of one time step and the number of steps are kept below this product, by choice of the step.
const CELLS_MAX: u64 = 1_500_000;
/// Prices tried for a late job, in GPU seconds: first these, spread evenly in the logarithm, ...
const PRICES: usize = 10;
/// ... then between the neighbours of the best, halved this many times.
const REFINEMENTS: usize = 4;
const PRICE_MIN_S: f64 = 0.02;
const PRICE_MAX_S: f64 = 500.0;

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
    /// A start, in seconds.
    start_s: f64,
}

/// Finds the bound for a target of the 95th percentile; nothing where the best plan uses all workers there are.
pub fn optimum(load: &Load, speed: &Speed, wait_p95_s: f64) -> Option<Optimum> {
    let grid = Grid::new(load, speed, wait_p95_s);
    let allowed = LATE_SHARE * load.jobs.len() as f64;
    let bound = |price_s: f64| grid.plan(price_s, None) - price_s * allowed;
    let ratio = (PRICE_MAX_S / PRICE_MIN_S).powf(1.0 / (PRICES - 1) as f64);
    let mut prices: Vec<(f64, f64)> = (0..PRICES as i32)
        .map(|i| PRICE_MIN_S * ratio.powi(i))
        .map(|price_s| (price_s, bound(price_s)))
        .collect();
    let best = |prices: &[(f64, f64)]| (0..prices.len()).max_by(|&a, &b| prices[a].1.total_cmp(&prices[b].1));
    for _ in 0..REFINEMENTS {
        let Some(at) = best(&prices) else { break };
        // The bound is concave in the price, so the best one lies next to the best one found.
        let neighbours = [at.checked_sub(1), Some(at + 1).filter(|&i| i < prices.len())];
        for neighbour in neighbours.into_iter().flatten() {
            let price_s = (prices[at].0 * prices[neighbour].0).sqrt();
            prices.push((price_s, bound(price_s)));
        }
        prices.sort_by(|a, b| a.0.total_cmp(&b.0));
    }
    let (price_s, gpu_s) = best(&prices).map_or((0.0, 0.0), |at| prices[at]);
    let mut choices = vec![0u8; grid.steps * grid.levels * (WORKERS_MAX + 1)];
    grid.plan(price_s, Some(&mut choices));
    let (replicas, waits_ms) = grid.follow(load, &choices);
    let most = replicas.iter().map(|&(_, workers)| workers as usize).max().unwrap_or(0);
    (most < WORKERS_MAX).then_some(Optimum { gpu_s, replicas, waits_ms })
}

impl Grid {
    fn new(load: &Load, speed: &Speed, wait_s: f64) -> Self {
        let works: Vec<f64> = load.jobs.iter().map(|job| job.work_s(speed)).collect();
        let total_s: f64 = works.iter().sum();
        let mean_s = total_s / works.len().max(1) as f64;
        let square_s: f64 = works.iter().map(|w| w * w).sum::<f64>() / works.len().max(1) as f64;
        // What a busy slot has left is the mean residual life, which is longer than half for mixed sizes.
        let residual = (square_s / (2.0 * mean_s * mean_s)).max(1.0);
        let deepest_s = deepest(load, &works, 2.0 * wait_s + 60.0) + 1.5 * LATE_SHARE * total_s;
        let length_s = load.length_ms as f64 / 1e3;
        let mut step_s = (wait_s / 30.0).clamp(1.0, 2.0);
        while (length_s / step_s) * (deepest_s / step_s) > CELLS_MAX as f64 {
            step_s *= 1.25;
        }
        let steps = (length_s / step_s).ceil() as usize;
        let mut grid = Grid {
            step_s,
            steps,
            levels: (deepest_s / step_s).ceil() as usize + 2,
            arriving: vec![0; steps],
            arrived: vec![0; steps],
            jobs_before: vec![0; steps + 1],
            jobs_by_unit: vec![0; (total_s / step_s) as usize + WORKERS_MAX + 2],
            in_service: f64::from(speed.slots) * mean_s * residual / step_s,
            wait_steps: (wait_s / step_s).ceil() as usize,
            start_s: speed.cold_start_s,
        };
        grid.fill(load, &works);
        grid
    }

    fn fill(&mut self, load: &Load, works: &[f64]) {
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
        let width = WORKERS_MAX + 1;
        // What is left at the end is worked off by workers that are there.
        let mut after: Vec<f32> =
            (0..self.levels * width).map(|i| (i / width) as f32 * self.step_s as f32).collect();
        let mut now = vec![0f32; self.levels * width];
        let mut costs = [0f32; WORKERS_MAX + 1];
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
    fn follow(&self, load: &Load, choices: &[u8]) -> (Vec<(u64, u32)>, Vec<u64>) {
        let (mut workers, mut backlog) = (0usize, 0usize);
        let mut replicas = Vec::new();
        let mut waits_ms = vec![0u64; load.jobs.len()];
        let mut started = 0;
        for step in 0..self.steps {
            let choice = choices[(step * self.levels + backlog) * (WORKERS_MAX + 1) + workers] as usize;
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
fn deepest(load: &Load, works: &[f64], span_s: f64) -> f64 {
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
