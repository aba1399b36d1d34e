//! One load, all policies: the rows of the table, and what the plots need.

use millrace_crds::scaling::ScalingSpec;
use millrace_crds::units::Span;

use super::cluster::{REPLICAS_MAX, SimOutcome, run};
use super::hindsight;
use super::hpa::{Behavior, HpaPolicy};
use super::keda::{Keda, KedaSettings};
use super::load::{Speed, Traffic};
use super::millrace::Millrace;
use super::optimum;
use super::plot::Series;
use super::report::Row;
use super::tune::{self, Tried};

/// The HPA's target: mean share of busy slots.
const HPA_TARGET: f64 = 0.8;

/// All policies on one load.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    /// The rows, the autoscaler's own first.
    pub rows: Vec<Row>,
    /// Workers over time.
    pub series: Vec<Series>,
    /// The setting of KEDA's rule that hindsight finds cheapest at [`wait_limit_s`].
    pub keda_tuned: Option<Tried>,
    /// The spec of the autoscaler that hindsight finds cheapest at no longer a wait than tuned KEDA's; not for loads
    /// of a million jobs.
    pub millrace_tuned: Option<ScalingSpec>,
}

/// The 95th percentile of the wait that every policy of a comparison is to keep: the target, or the autoscaler's own
/// where that is longer. So no rival is held to a shorter wait than the autoscaler.
pub fn wait_limit_s(load: &Traffic, own: &Row) -> f64 {
    own.wait_p95_s.max(load.queue_wait_s as f64)
}

/// The spec that the simulation runs with: the defaults, but for the load's wait target and as many workers
/// as every other policy may have.
pub fn spec(queue_wait_s: u64) -> ScalingSpec {
    let mut spec = ScalingSpec { max_replicas: REPLICAS_MAX, ..ScalingSpec::default() };
    spec.targets.queue_wait = Span::seconds(queue_wait_s);
    spec
}

/// Runs the autoscaler alone.
pub fn run_own(load: &Traffic, speed: &Speed) -> anyhow::Result<SimOutcome> {
    run(load, speed, &mut Millrace::new(spec(load.queue_wait_s)))
}

/// Runs all policies.
pub fn compare(load: &Traffic, speed: &Speed) -> anyhow::Result<Comparison> {
    let mut comparison = Comparison::default();
    comparison.add(load, "millrace", &run_own(load, speed)?);
    let limit_s = wait_limit_s(load, &comparison.rows[0]);
    let tried = tune::try_all(load, speed, &tune::grid(&[load], speed, REPLICAS_MAX))?;
    comparison.keda_tuned = tune::cheapest(&tried, limit_s).cloned();
    let tuned = comparison.keda_tuned.as_ref().map(|pick| ("keda-tuned", pick.settings));
    let sized = ("keda-sized", KedaSettings::sized(load, speed, REPLICAS_MAX));
    let defaults = ("keda-default", KedaSettings::defaults(REPLICAS_MAX));
    for (name, settings) in tuned.into_iter().chain([sized, defaults]) {
        comparison.add(load, name, &run(load, speed, &mut Keda::new(name, settings))?);
    }
    let behavior = Behavior { min: 1, max: REPLICAS_MAX, up_window_ms: 0, down_window_ms: 300_000 };
    let hpa = run(load, speed, &mut HpaPolicy::new(HPA_TARGET, behavior))?;
    comparison.add(load, "hpa-default", &hpa);
    if let Some(outcome) = optimum::executed(load, speed, limit_s)? {
        comparison.add(load, "clairvoyant-run", &outcome);
    }
    if let Some(best) = optimum::optimum(load, speed, limit_s) {
        comparison.rows.push(Row::of_optimum(load, &best));
        comparison.series.push(Series { name: "clairvoyant".into(), replicas: best.replicas });
    }
    if load.jobs.len() <= tune::THIN_ABOVE
        && let Some(rival) = &comparison.keda_tuned
        && let Some((spec, outcome)) = hindsight::tuned(load, speed, rival.row.wait_p95_s)?
    {
        comparison.rows.push(Row::new(load, "millrace-tuned", &outcome));
        comparison.millrace_tuned = Some(spec);
    }
    Ok(comparison)
}

impl Comparison {
    fn add(&mut self, load: &Traffic, name: &str, outcome: &SimOutcome) {
        self.rows.push(Row::new(load, name, outcome));
        self.series.push(Series { name: name.into(), replicas: outcome.replicas.clone() });
    }

    /// The row of a policy.
    pub fn row(&self, policy: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.policy == policy)
    }

    /// One policy's GPU time over another's.
    pub fn ratio(&self, one: &str, other: &str) -> Option<f64> {
        Some(self.row(one)?.gpu_seconds / self.row(other)?.gpu_seconds)
    }
}
