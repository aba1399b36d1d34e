//! The autoscaler tuned with hindsight: what the fields of its spec could at best be set to for one load.
//!
//! It runs as it does in production and knows nothing of what comes; only its settings were chosen after the fact.
//! So this is the floor of a family of rules that do not know the future. What lies between it and the clairvoyant
//! bound is for knowing the future, or for another kind of rule.

use millrace_crds::scaling::ScalingSpec;
use millrace_crds::units::Span;

use super::cluster::{REPLICAS_MAX, SimOutcome, run};
use super::compare::spec;
use super::load::{Speed, Traffic};
use super::millrace::Millrace;
use super::report::Row;

/// Wait targets, as shares of the load's own in percent.
const WAITS: [u64; 8] = [70, 80, 85, 90, 95, 97, 100, 107];
/// Most workers.
const MOST: [u32; 6] = [3, 4, 5, 6, 8, REPLICAS_MAX];
/// Fewest workers.
const FEWEST: [u32; 3] = [0, 1, 2];
/// Stabilisation downwards, in seconds.
const DOWN_S: [u64; 3] = [0, 5, 30];
/// Workers that may be added at once.
const STEPS: [u32; 3] = [1, 4, 8];

/// All settings.
fn grid(load: &Traffic) -> Vec<ScalingSpec> {
    let mut all = Vec::new();
    for wait in WAITS {
        for max_replicas in MOST {
            for min_replicas in FEWEST {
                for down_s in DOWN_S {
                    all.extend(STEPS.map(|max_step| {
                        let queue_wait_s = (load.queue_wait_s * wait / 100).max(1);
                        let mut spec =
                            ScalingSpec { min_replicas, max_replicas, max_step, ..spec(queue_wait_s) };
                        spec.stabilization.down = Span::seconds(down_s);
                        spec
                    }));
                }
            }
        }
    }
    all
}

/// The cheapest setting of the grid whose 95th percentile of the wait is no longer than a limit, and what came of it;
/// nothing where none keeps it. Runs on as many threads as there are cores.
pub fn tuned(
    load: &Traffic,
    speed: &Speed,
    wait_p95_s: f64,
) -> anyhow::Result<Option<(ScalingSpec, SimOutcome)>> {
    let grid = grid(load);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let best_of = |specs: &[ScalingSpec]| -> anyhow::Result<Option<(ScalingSpec, SimOutcome)>> {
        let mut best: Option<(ScalingSpec, SimOutcome)> = None;
        for spec in specs {
            let outcome = run(load, speed, &mut Millrace::new(spec.clone()))?;
            let cheaper = best.as_ref().is_none_or(|(_, best)| outcome.gpu_ms < best.gpu_ms);
            if cheaper && Row::new(load, "", &outcome).wait_p95_s <= wait_p95_s {
                best = Some((spec.clone(), outcome));
            }
        }
        Ok(best)
    };
    std::thread::scope(|scope| {
        let parts = grid.chunks(grid.len().div_ceil(threads).max(1));
        let runs: Vec<_> = parts.map(|part| scope.spawn(move || best_of(part))).collect();
        let mut best: Vec<(ScalingSpec, SimOutcome)> = Vec::new();
        for run in runs {
            best.extend(run.join().map_err(|_| anyhow::anyhow!("a run of the grid panicked"))??);
        }
        Ok(best.into_iter().min_by_key(|(_, outcome)| outcome.gpu_ms))
    })
}
