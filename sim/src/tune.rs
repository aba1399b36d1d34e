//! Tunes KEDA's rule with hindsight: every setting of a grid is run over the load, and the cheapest one that
//! keeps a given wait wins. This is more than anyone can do in production, where tomorrow's load is unknown.

use super::cluster::run;
use super::hpa::Behavior;
use super::keda::{Keda, KedaSettings};
use super::load::{Speed, Traffic};
use super::report::Row;

/// Lags that one pod is to have, as shares of what a worker finishes within the wait target: the least, the most, ...
const LAG_SHARES: [f64; 2] = [0.1, 2.0];
/// ... and each over the one before.
const LAG_STEP: f64 = 1.17;
/// Polling intervals, in seconds.
const POLLING_S: [u64; 2] = [1, 30];
/// Cooldowns, in seconds.
const COOLDOWN_S: [u64; 3] = [15, 60, 300];
/// Stabilisation downwards, in seconds.
const DOWN_S: [u64; 6] = [0, 15, 30, 60, 120, 300];
/// Stabilisation upwards, in seconds.
const UP_S: [u64; 2] = [0, 30];
/// Fewest pods.
const MIN: [u32; 3] = [0, 1, 2];
/// Loads with more jobs than this get the thin grid, and the autoscaler none.
pub const THIN_ABOVE: usize = 100_000;

/// All settings of the grid for some loads, or a thinner grid for loads of a million jobs.
pub fn grid(loads: &[&Traffic], speed: &Speed, max: u32) -> Vec<KedaSettings> {
    let within_target = loads.iter().map(|load| load.worker_rate(speed) * load.queue_wait_s as f64);
    let (least, most) =
        within_target.fold((f64::MAX, 0.0f64), |(least, most), n| (least.min(n), most.max(n)));
    let mut lag = least * LAG_SHARES[0];
    let mut lags: Vec<u32> = Vec::new();
    while lag <= most * LAG_SHARES[1] {
        lags.push(lag.round().max(1.0) as u32);
        lag *= LAG_STEP;
    }
    lags.dedup();
    let mut all = Vec::new();
    for lag_threshold in lags {
        for polling_s in POLLING_S {
            for cooldown_s in COOLDOWN_S {
                for down_s in DOWN_S {
                    for up_s in UP_S {
                        let (up_window_ms, down_window_ms) = (up_s * 1000, down_s * 1000);
                        let (polling_ms, cooldown_ms) = (polling_s * 1000, cooldown_s * 1000);
                        all.extend(MIN.map(|min| {
                            let behavior = Behavior { min, max, up_window_ms, down_window_ms };
                            KedaSettings { lag_threshold, polling_ms, cooldown_ms, behavior }
                        }));
                    }
                }
            }
        }
    }
    // With a floor of one pod or more, KEDA's own polling and cooldown do nothing.
    all.retain(|s| s.behavior.min == 0 || (s.polling_ms == 1_000 && s.cooldown_ms == 300_000));
    if loads.iter().any(|load| load.jobs.len() > THIN_ABOVE) {
        // Over a night the windows hardly matter.
        all.retain(|s| s.polling_ms == 30_000 && s.cooldown_ms == 60_000 && s.behavior.up_window_ms == 0);
        all.retain(|s| [0, 60].contains(&(s.behavior.down_window_ms / 1000)));
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
pub fn try_all(load: &Traffic, speed: &Speed, grid: &[KedaSettings]) -> anyhow::Result<Vec<Tried>> {
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

/// The one setting that serves several loads best, each tried over the same grid: it keeps each load's limit, and
/// the mean of its cost over the cheapest for that load is least. The place in the grid.
pub fn cheapest_for_all(tried: &[Vec<Tried>], limits_s: &[f64]) -> Option<usize> {
    let least = |(tried, &limit_s): (&Vec<Tried>, &f64)| Some(cheapest(tried, limit_s)?.row.gpu_seconds);
    let least: Vec<f64> = tried.iter().zip(limits_s).map(least).collect::<Option<_>>()?;
    let cost = |at: usize| -> Option<f64> {
        let rows = || tried.iter().map(|tried| &tried[at].row);
        let keeps = rows().zip(limits_s).all(|(row, &limit_s)| row.wait_p95_s <= limit_s);
        keeps.then(|| rows().zip(&least).map(|(row, least)| row.gpu_seconds / least).sum())
    };
    let places = (0..tried.first()?.len()).filter_map(|at| Some((at, cost(at)?)));
    places.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use super::super::cluster::SimOutcome;
    use super::*;

    fn tried(figures: &[(f64, f64)]) -> Vec<Tried> {
        let load = Traffic { name: "none".into(), jobs: Vec::new(), length_ms: 0, queue_wait_s: 60 };
        let one = |&(gpu_seconds, wait_p95_s)| {
            let row = Row { gpu_seconds, wait_p95_s, ..Row::new(&load, "", &SimOutcome::default()) };
            Tried { settings: KedaSettings::defaults(8), row }
        };
        figures.iter().map(one).collect()
    }

    #[test]
    fn one_setting_for_all_keeps_each_wait_and_is_least_in_the_mean_of_the_ratios() {
        let first = tried(&[(100.0, 50.0), (150.0, 50.0), (110.0, 50.0), (90.0, 70.0)]);
        let second = tried(&[(3000.0, 50.0), (1000.0, 50.0), (1500.0, 50.0), (900.0, 50.0)]);
        assert_eq!(cheapest(&first, 60.0).map(|tried| tried.row.gpu_seconds), Some(100.0));
        // Over the cheapest, 100 and 900: 1 + 3.3, 1.5 + 1.1, 1.1 + 1.7; the last misses the first load's wait.
        assert_eq!(cheapest_for_all(&[first.clone(), second.clone()], &[60.0, 60.0]), Some(1));
        assert_eq!(cheapest_for_all(&[first, second], &[60.0, 40.0]), None);
    }
}
