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

/// Loads with more jobs than this get the thin grid.
const THIN_ABOVE: usize = 100_000;
/// The HPA's target: mean share of busy slots.
const HPA_TARGET: f64 = 0.8;

/// All policies on one load.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// The rows, the autoscaler's own first.
    pub rows: Vec<Row>,
    /// Workers over time.
    pub series: Vec<Series>,
    /// The setting of KEDA's rule that is cheapest at the autoscaler's own 95th percentile.
    pub keda_equal: Option<Tried>,
    /// The setting of KEDA's rule that is cheapest at the wait target.
    pub keda_target: Option<Tried>,
}

/// The spec that the simulation runs with: the defaults, but for the load's target, room to scale, and no
/// hold beyond what the function itself finds worth it.
pub fn spec(queue_wait_s: u64) -> ScalingSpec {
    let mut spec =
        ScalingSpec { max_replicas: REPLICAS_MAX, max_step: REPLICAS_MAX, ..ScalingSpec::default() };
    spec.idle_after = Span::seconds(60);
    spec.targets.queue_wait = Span::seconds(queue_wait_s);
    spec.stabilization.down = Span::seconds(0);
    spec
}

/// Runs the autoscaler alone.
pub fn run_own(load: &Load, speed: &Speed) -> anyhow::Result<Outcome> {
    run(load, speed, &mut Millrace::new(spec(load.queue_wait_s)))
}

/// Runs all policies.
pub fn compare(load: &Load, speed: &Speed) -> anyhow::Result<Comparison> {
    let own = run_own(load, speed)?;
    let mut comparison =
        Comparison { rows: Vec::new(), series: Vec::new(), keda_equal: None, keda_target: None };
    comparison.add(load, "millrace", &own);
    let wait_p95_s = comparison.rows[0].wait_p95_s;
    let defaults = run(load, speed, &mut Keda::new("keda-default", KedaSettings::defaults(REPLICAS_MAX)))?;
    comparison.add(load, "keda-default", &defaults);
    let tried = tune::try_all(load, speed, &tune::grid(REPLICAS_MAX, load.jobs.len() > THIN_ABOVE))?;
    let picks = [("keda-equal", wait_p95_s), ("keda-target", load.queue_wait_s as f64)];
    for (name, limit_s) in picks {
        let pick = tune::cheapest(&tried, limit_s).cloned();
        if let Some(pick) = &pick {
            let outcome = run(load, speed, &mut Keda::new(name, pick.settings))?;
            comparison.add(load, name, &outcome);
        }
        match name {
            "keda-equal" => comparison.keda_equal = pick,
            _ => comparison.keda_target = pick,
        }
    }
    let behavior = Behavior { min: 1, max: REPLICAS_MAX, up_window_ms: 0, down_window_ms: 300_000 };
    let hpa = run(load, speed, &mut HpaPolicy::new(HPA_TARGET, behavior))?;
    comparison.add(load, "hpa-default", &hpa);
    let best = optimum(load, speed, wait_p95_s);
    comparison.rows.push(Row::of_optimum(load, &best));
    comparison.series.push(Series { name: "clairvoyant".into(), replicas: best.replicas });
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
