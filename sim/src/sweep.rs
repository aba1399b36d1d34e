//! The comparison over a grid of worker rates and cold starts, one [`Cell`] a trace and point.
//!
//! KEDA's rule stands there four times: tuned with hindsight for each cell, as nobody can; at the one setting that
//! serves all traces of the point best, still with hindsight; as a careful user sizes it; at its defaults. The
//! first two keep the wait that the autoscaler keeps. The last two do not know a wait to keep, so the autoscaler is
//! asked for theirs: [`Cell::millrace_as_sized`] and [`Cell::millrace_as_default`].

use millrace_crds::units::Span;
use serde::Serialize;

use super::cluster::{REPLICAS_MAX, SimOutcome, run};
use super::compare::{run_own, spec, wait_limit_s};
use super::keda::{Keda, KedaSettings};
use super::load::{Speed, Traffic};
use super::millrace::Millrace;
use super::optimum::optimum;
use super::report::Row;
use super::tune;

/// Wait targets that the autoscaler is tried with to give a rival's wait, in seconds.
const WAITS_S: [u64; 11] = [1, 5, 10, 20, 25, 30, 40, 45, 50, 60, 90];
/// Fewest workers that it is tried with for the same.
const MIN: [u32; 10] = [0, 1, 2, 4, 6, 8, 12, 16, 24, 32];

/// The figures of a policy that the bars are about.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Figures {
    /// GPU time.
    pub gpu_seconds: f64,
    /// 95th percentile of the wait.
    pub wait_p95_s: f64,
    /// Changes of the number of workers.
    pub scale_events: u64,
}

/// One trace at one rate and cold start.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cell {
    /// The trace.
    pub trace: String,
    /// The worker's rates over those of [`super::load::SPEED`].
    pub rate: f64,
    /// A start, in seconds.
    pub cold_start_s: f64,
    /// The wait that all but the sized and the default setting keep.
    pub wait_limit_s: f64,
    /// The autoscaler at its defaults.
    pub millrace: Figures,
    /// KEDA's rule at the setting that is cheapest for this cell.
    pub keda_tuned: Option<Figures>,
    /// KEDA's rule at the one setting that is cheapest for all traces at this rate and cold start.
    pub keda_one: Option<Figures>,
    /// KEDA's rule as a careful user sizes it.
    pub keda_sized: Figures,
    /// The autoscaler, asked for the wait that this gave.
    pub millrace_as_sized: Option<Figures>,
    /// KEDA's rule at its defaults.
    pub keda_default: Figures,
    /// The autoscaler, asked for the wait that this gave.
    pub millrace_as_default: Option<Figures>,
    /// The clairvoyant bound, or the work itself where that is more, in GPU seconds.
    pub clairvoyant_gpu_seconds: f64,
}

impl Figures {
    fn new(load: &Traffic, outcome: &SimOutcome) -> Self {
        Self::of(&Row::new(load, "", outcome))
    }

    fn of(row: &Row) -> Self {
        let Row { gpu_seconds, wait_p95_s, scale_events, .. } = *row;
        Self { gpu_seconds, wait_p95_s, scale_events }
    }
}

/// All loads at one multiple of the rates of a speed.
pub fn point(loads: &[Traffic], speed: &Speed, rate: f64) -> anyhow::Result<Vec<Cell>> {
    let speed = &Speed {
        prompt_tokens_per_s: speed.prompt_tokens_per_s * rate,
        output_tokens_per_s: speed.output_tokens_per_s * rate,
        ..*speed
    };
    let grid = tune::grid(&loads.iter().collect::<Vec<_>>(), speed, REPLICAS_MAX);
    let own = loads.iter().map(|load| Ok(Row::new(load, "millrace", &run_own(load, speed)?)));
    let own: Vec<Row> = own.collect::<anyhow::Result<_>>()?;
    let limits_s: Vec<f64> = loads.iter().zip(&own).map(|(load, row)| wait_limit_s(load, row)).collect();
    let tried = loads.iter().map(|load| tune::try_all(load, speed, &grid));
    let tried: Vec<_> = tried.collect::<anyhow::Result<_>>()?;
    let one = tune::cheapest_for_all(&tried, &limits_s);
    let bounds_s = bounds(loads, speed, &limits_s)?;
    let cell = |(at, load): (usize, &Traffic)| -> anyhow::Result<Cell> {
        let keda = |settings| run(load, speed, &mut Keda::new("keda", settings));
        let keda_sized = Figures::new(load, &keda(KedaSettings::sized(load, speed, REPLICAS_MAX))?);
        let keda_default = Figures::new(load, &keda(KedaSettings::defaults(REPLICAS_MAX))?);
        let tuned = tune::cheapest(&tried[at], limits_s[at]);
        Ok(Cell {
            trace: load.name.clone(),
            rate,
            cold_start_s: speed.cold_start_s,
            wait_limit_s: limits_s[at],
            millrace: Figures::of(&own[at]),
            keda_tuned: tuned.map(|tried| Figures::of(&tried.row)),
            keda_one: one.map(|place| Figures::of(&tried[at][place].row)),
            keda_sized,
            millrace_as_sized: own_for(load, speed, keda_sized.wait_p95_s)?,
            keda_default,
            millrace_as_default: own_for(load, speed, keda_default.wait_p95_s)?,
            clairvoyant_gpu_seconds: bounds_s[at],
        })
    };
    loads.iter().enumerate().map(cell).collect()
}

/// The clairvoyant bound of each load, in GPU seconds: no less than its work.
fn bounds(loads: &[Traffic], speed: &Speed, limits_s: &[f64]) -> anyhow::Result<Vec<f64>> {
    let bound = |load: &Traffic, limit_s: f64| {
        let best = optimum(load, speed, limit_s);
        best.map_or(0.0, |best| best.gpu_s).max(load.work_s(speed))
    };
    std::thread::scope(|scope| {
        let run = |(load, &limit_s)| scope.spawn(move || bound(load, limit_s));
        let runs: Vec<_> = loads.iter().zip(limits_s).map(run).collect();
        let panicked = |_| anyhow::anyhow!("the computation of a bound panicked");
        runs.into_iter().map(|run| run.join().map_err(panicked)).collect()
    })
}

/// The cheapest run of the autoscaler that keeps a wait, over its wait target and its fewest workers.
fn own_for(load: &Traffic, speed: &Speed, wait_p95_s: f64) -> anyhow::Result<Option<Figures>> {
    let mut best: Option<Figures> = None;
    for queue_wait_s in WAITS_S {
        for min_replicas in MIN {
            let mut spec = spec(load.queue_wait_s);
            spec.targets.queue_wait = Span::seconds(queue_wait_s);
            spec.min_replicas = min_replicas;
            let figures = Figures::new(load, &run(load, speed, &mut Millrace::new(spec))?);
            let cheaper = best.is_none_or(|best| figures.gpu_seconds < best.gpu_seconds);
            if figures.wait_p95_s <= wait_p95_s && cheaper {
                best = Some(figures);
            }
        }
    }
    Ok(best)
}

impl Cell {
    /// The autoscaler's GPU time over that of KEDA's rule tuned for this cell.
    pub fn over_tuned(&self) -> Option<f64> {
        Some(self.millrace.gpu_seconds / self.keda_tuned?.gpu_seconds)
    }

    /// The same over KEDA's rule at one setting for all traces.
    pub fn over_one(&self) -> Option<f64> {
        Some(self.millrace.gpu_seconds / self.keda_one?.gpu_seconds)
    }

    /// The same over KEDA's rule as a user sizes it, at no longer a wait.
    pub fn over_sized(&self) -> Option<f64> {
        Some(self.millrace_as_sized?.gpu_seconds / self.keda_sized.gpu_seconds)
    }

    /// The same over KEDA's defaults, at no longer a wait.
    pub fn over_default(&self) -> Option<f64> {
        Some(self.millrace_as_default?.gpu_seconds / self.keda_default.gpu_seconds)
    }

    /// The autoscaler's GPU time over the bound.
    pub fn over_clairvoyant(&self) -> Option<f64> {
        Some(self.millrace.gpu_seconds / self.clairvoyant_gpu_seconds)
    }

    /// The bound over tuned KEDA: no rule that keeps the wait comes below this ratio.
    pub fn floor(&self) -> Option<f64> {
        Some(self.clairvoyant_gpu_seconds / self.keda_tuned?.gpu_seconds)
    }

    /// Whether the autoscaler changes the number of workers less often than tuned KEDA; not where there is none.
    pub fn fewer_events(&self) -> Option<bool> {
        Some(self.millrace.scale_events < self.keda_tuned?.scale_events)
    }
}

/// The head of the table.
pub const HEAD: &str = "trace        rate  start s    GPU-s  p95 s  events | of tuned  of one  of sized  of default \
| of clairvoyant  clairvoyant/tuned | events tuned";

/// One line of the table.
pub fn line(cell: &Cell) -> String {
    let text = |ratio: Option<f64>| ratio.map_or("-".into(), |ratio| format!("{ratio:.3}"));
    format!(
        "{:<11} {:>5} {:>8} {:>8.0} {:>6.1} {:>7} | {:>8} {:>7} {:>9} {:>11} | {:>14} {:>18} | {:>12}",
        cell.trace,
        cell.rate,
        cell.cold_start_s,
        cell.millrace.gpu_seconds,
        cell.millrace.wait_p95_s,
        cell.millrace.scale_events,
        text(cell.over_tuned()),
        text(cell.over_one()),
        text(cell.over_sized()),
        text(cell.over_default()),
        text(cell.over_clairvoyant()),
        text(cell.floor()),
        cell.keda_tuned.map_or("-".into(), |keda| keda.scale_events.to_string())
    )
}

/// In how many cells each bar holds, and the range of each ratio, as sentences.
pub fn summary(cells: &[Cell]) -> String {
    type Ratio = fn(&Cell) -> Option<f64>;
    let ratios: [(&str, Ratio, f64); 6] = [
        ("GPU time over KEDA's rule tuned for the cell", Cell::over_tuned, 0.75),
        ("over KEDA's rule at one setting for both traces", Cell::over_one, 0.75),
        ("over KEDA's rule as sized by a user, at its wait", Cell::over_sized, 0.75),
        ("over KEDA's defaults, at their wait", Cell::over_default, 0.75),
        ("over the clairvoyant bound", Cell::over_clairvoyant, 1.25),
        ("the bound over tuned KEDA, the least of any rule", Cell::floor, 0.75),
    ];
    let mut text = String::new();
    for (name, ratio, bar) in ratios {
        let mut known: Vec<f64> = cells.iter().filter_map(ratio).collect();
        known.sort_by(f64::total_cmp);
        let (Some(&least), Some(&most)) = (known.first(), known.last()) else { continue };
        let (median, holds) = (known[known.len() / 2], known.iter().filter(|&&ratio| ratio <= bar).count());
        text += &format!(
            "{name}: <= {bar} in {holds} of {} cells; {least:.3} to {most:.3}, median {median:.3}\n",
            known.len()
        );
    }
    let fewer: Vec<bool> = cells.iter().filter_map(Cell::fewer_events).collect();
    let holds = fewer.iter().filter(|&&holds| holds).count();
    text + &format!("fewer scale events than tuned KEDA: in {holds} of {} cells\n", fewer.len())
}
