//! Tunes KEDA's rule with hindsight: every setting of a grid is run over the load, and the cheapest one that
//! keeps a given wait wins. This is more than anyone can do in production, where tomorrow's load is unknown.

use super::cluster::run;
use super::hpa::Behavior;
use super::keda::{Keda, KedaSettings};
use super::load::{Load, Speed};
use super::report::Row;

/// Lag that one pod is to have.
const LAG_THRESHOLDS: [u32; 22] =
    [4, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 200];
/// Polling intervals, in seconds.
const POLLING_S: [u64; 2] = [1, 30];
/// Cooldowns, in seconds.
const COOLDOWN_S: [u64; 4] = [15, 60, 120, 300];
/// Stabilisation downwards, in seconds.
const DOWN_S: [u64; 6] = [0, 15, 30, 60, 120, 300];
/// Stabilisation upwards, in seconds.
const UP_S: [u64; 2] = [0, 30];
/// Fewest pods.
const MIN: [u32; 3] = [0, 1, 2];

/// All settings of the grid, or a thinner one for loads of a million jobs.
pub fn grid(max: u32, thin: bool) -> Vec<KedaSettings> {
    let mut all = Vec::new();
    for lag_threshold in LAG_THRESHOLDS {
        for polling_s in POLLING_S {
            for cooldown_s in COOLDOWN_S {
                for down_s in DOWN_S {
                    for up_s in UP_S {
                        for min in MIN {
                            let behavior = Behavior {
                                min,
                                max,
                                up_window_ms: up_s * 1000,
                                down_window_ms: down_s * 1000,
                            };
                            let (polling_ms, cooldown_ms) = (polling_s * 1000, cooldown_s * 1000);
                            all.push(KedaSettings { lag_threshold, polling_ms, cooldown_ms, behavior });
                        }
                    }
                }
            }
        }
    }
    // With a floor of one pod or more, KEDA's own polling and cooldown do nothing.
    all.retain(|s| s.behavior.min == 0 || (s.polling_ms == 1_000 && s.cooldown_ms == 300_000));
    if thin {
        // A backlog of a million jobs needs a threshold of its size; the windows hardly matter.
        all.retain(|s| s.polling_ms == 30_000 && s.cooldown_ms == 60_000 && s.behavior.up_window_ms == 0);
        all.retain(|s| [0, 60].contains(&(s.behavior.down_window_ms / 1000)));
        for settings in &mut all {
            settings.lag_threshold *= 500;
        }
    }
    all
}

/// A setting and what came of it.
#[derive(Debug, Clone)]
pub struct Tried {
    /// The setting.
    pub settings: KedaSettings,
    /// Its figures.
    pub row: Row,
}

/// Runs every setting, on as many threads as there are cores.
pub fn try_all(load: &Load, speed: &Speed, grid: &[KedaSettings]) -> anyhow::Result<Vec<Tried>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let part = grid.len().div_ceil(threads).max(1);
    let try_one = |settings: &KedaSettings| -> anyhow::Result<Tried> {
        let outcome = run(load, speed, &mut Keda::new("keda-tuned", *settings))?;
        Ok(Tried { settings: *settings, row: Row::new(load, "keda-tuned", &outcome) })
    };
    std::thread::scope(|scope| {
        let runs: Vec<_> = grid
            .chunks(part)
            .map(|chunk| scope.spawn(move || chunk.iter().map(try_one).collect::<anyhow::Result<Vec<_>>>()))
            .collect();
        let mut all = Vec::with_capacity(grid.len());
        for run in runs {
            all.extend(run.join().map_err(|_| anyhow::anyhow!("a run of the grid panicked"))??);
        }
        Ok(all)
    })
}

/// The cheapest setting whose 95th percentile is no longer than a limit.
pub fn cheapest(tried: &[Tried], wait_p95_s: f64) -> Option<&Tried> {
    let keeps = tried.iter().filter(|tried| tried.row.wait_p95_s <= wait_p95_s);
    keeps.min_by(|a, b| a.row.gpu_seconds.total_cmp(&b.row.gpu_seconds))
}
