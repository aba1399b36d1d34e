//! One load, all policies: the rows of the table, and what the plots need.

use millrace_crds::scaling::ScalingSpec;
use millrace_crds::units::Span;

use super::cluster::{Outcome, REPLICAS_MAX, run};
use super::hpa::{Behavior, HpaPolicy};
use super::keda::{Keda, KedaSettings};
use super::load::{Load, Speed};
use super::millrace::Millrace;
use super::optimum::optimum;
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
    /// The setting of KEDA's rule that hindsight finds cheapest at the autoscaler's own 95th percentile.
    pub keda_equal: Option<Tried>,
    /// The setting of KEDA's rule that hindsight finds cheapest at the wait target.
    pub keda_tuned: Option<Tried>,
}

/// The spec that the simulation runs with: the defaults, but for the load's wait target and as many workers
/// as every other policy may have.
pub fn spec(queue_wait_s: u64) -> ScalingSpec {
    let mut spec = ScalingSpec { max_replicas: REPLICAS_MAX, ..ScalingSpec::default() };
    spec.targets.queue_wait = Span::seconds(queue_wait_s);
    spec
}

/// Runs the autoscaler alone.
pub fn run_own(load: &Load, speed: &Speed) -> anyhow::Result<Outcome> {
    run(load, speed, &mut Millrace::new(spec(load.queue_wait_s)))
}

/// Runs the autoscaler, KEDA's rule tuned with hindsight, and the optimum: what the bars are about.
pub fn compare_tuned(load: &Load, speed: &Speed) -> anyhow::Result<Comparison> {
    let mut comparison = Comparison::default();
    comparison.add(load, "millrace", &run_own(load, speed)?);
    let wait_p95_s = comparison.rows[0].wait_p95_s;
    let tried = tune::try_all(load, speed, &tune::grid(load, speed, REPLICAS_MAX))?;
    let mut pick = |name: &str, limit_s: f64| -> anyhow::Result<Option<Tried>> {
        let pick = tune::cheapest(&tried, limit_s).cloned();
        if let Some(pick) = &pick {
            comparison.add(load, name, &run(load, speed, &mut Keda::new(name, pick.settings))?);
        }
        Ok(pick)
    };
    let keda_tuned = pick("keda-tuned", load.queue_wait_s as f64)?;
    let keda_equal = pick("keda-equal", wait_p95_s)?;
    (comparison.keda_tuned, comparison.keda_equal) = (keda_tuned, keda_equal);
    if let Some(best) = optimum(load, speed, wait_p95_s) {
        comparison.rows.push(Row::of_optimum(load, &best));
        comparison.series.push(Series { name: "clairvoyant".into(), replicas: best.replicas });
    }
    Ok(comparison)
}

/// Runs all policies.
pub fn compare(load: &Load, speed: &Speed) -> anyhow::Result<Comparison> {
    let mut comparison = compare_tuned(load, speed)?;
    for (name, settings) in [
        ("keda-default", KedaSettings::defaults(REPLICAS_MAX)),
        ("keda-sized", KedaSettings::sized(load, speed, REPLICAS_MAX)),
    ] {
        comparison.add(load, name, &run(load, speed, &mut Keda::new(name, settings))?);
    }
    let behavior = Behavior { min: 1, max: REPLICAS_MAX, up_window_ms: 0, down_window_ms: 300_000 };
    let hpa = run(load, speed, &mut HpaPolicy::new(HPA_TARGET, behavior))?;
    comparison.add(load, "hpa-default", &hpa);
    Ok(comparison)
}

impl Comparison {
    fn add(&mut self, load: &Load, name: &str, outcome: &Outcome) {
        self.rows.push(Row::new(load, name, outcome));
        self.series.push(Series { name: name.into(), replicas: outcome.replicas.clone() });
    }

    /// The row of a policy.
    pub fn row(&self, policy: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.policy == policy)
    }

    /// The autoscaler's GPU time over another policy's.
    pub fn ratio(&self, policy: &str) -> Option<f64> {
        Some(self.row("millrace")?.gpu_seconds / self.row(policy)?.gpu_seconds)
    }
}
