//! The operator's metrics. Base units, closed sets of labels; a deleted model's series go with it.

use millrace_crds::names::{Class, ModelRef};
use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use millrace_autoscaler::{Decision, QueueReading};

/// Buckets of the duration of a reconcile, in seconds.
const BUCKETS: [f64; 10] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0];

/// All metrics.
#[derive(Debug)]
pub struct OperatorMetrics {
    registry: Registry,
    /// Reconciles begun.
    pub reconciles: IntCounter,
    /// Reconciles that failed, by step.
    pub errors: IntCounterVec,
    /// How long reconciles take.
    pub duration: Histogram,
    /// Writes to the API server, by kind of write.
    pub writes: IntCounterVec,
    /// Streams and consumers that were missing or differed after they had been made.
    pub repairs: IntCounter,
    /// Sleeping models that a job woke.
    pub wakes: IntCounter,
    /// Whether this operator works.
    pub leader: IntGauge,
    models: IntGauge,
    decisions: IntCounterVec,
    desired: IntGaugeVec,
    ready: IntGaugeVec,
    backlog: IntGaugeVec,
}

impl OperatorMetrics {
    /// All at zero.
    ///
    /// # Errors
    /// When two metrics have one name, which a test would have shown.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let name = |name: &str| format!("millrace_operator_{name}");
        let counter = |suffix: &str, help: &str| -> Result<IntCounter, prometheus::Error> {
            let metric = IntCounter::new(name(suffix), help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let gauge = |suffix: &str, help: &str| -> Result<IntGauge, prometheus::Error> {
            let metric = IntGauge::new(name(suffix), help)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let counters =
            |name: &str, help: &str, labels: &[&str]| -> Result<IntCounterVec, prometheus::Error> {
                let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
                registry.register(Box::new(metric.clone()))?;
                Ok(metric)
            };
        let gauges = |name: &str, help: &str, labels: &[&str]| -> Result<IntGaugeVec, prometheus::Error> {
            let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(metric.clone()))?;
            Ok(metric)
        };
        let seconds = HistogramOpts::new(name("reconcile_duration_seconds"), "How long reconciles take.");
        let duration = Histogram::with_opts(seconds.buckets(BUCKETS.to_vec()))?;
        registry.register(Box::new(duration.clone()))?;
        let model = ["namespace", "model"];
        Ok(Self {
            reconciles: counter("reconcile_total", "Reconciles begun.")?,
            errors: counters(&name("reconcile_errors_total"), "Reconciles that failed.", &["step"])?,
            duration,
            writes: counters(&name("writes_total"), "Writes to the API server.", &["what"])?,
            repairs: counter("queue_repairs_total", "Streams and consumers put right.")?,
            wakes: counter("wakes_total", "Sleeping models that a job woke.")?,
            leader: gauge("leader", "1 while this operator works.")?,
            models: gauge("models", "InferenceModels known.")?,
            decisions: counters(
                "millrace_scaling_decisions_total",
                "Changes of the number of workers.",
                &["direction", "reason"],
            )?,
            desired: gauges("millrace_desired_replicas", "Workers asked for.", &model)?,
            ready: gauges("millrace_ready_replicas", "Workers that take jobs.", &model)?,
            backlog: gauges(
                "millrace_backlog",
                "Jobs without an outcome.",
                &["namespace", "model", "class"],
            )?,
            registry,
        })
    }

    /// Shows a model's numbers.
    pub fn show(&self, model: &ModelRef, desired: u32, ready: u32, reading: Option<&QueueReading>) {
        let labels = [model.namespace.as_str(), model.name.as_str()];
        self.desired.with_label_values(&labels).set(desired.into());
        self.ready.with_label_values(&labels).set(ready.into());
        for class in reading.iter().flat_map(|reading| &reading.classes) {
            let labels = [model.namespace.as_str(), model.name.as_str(), class.class.as_str()];
            let jobs = class.pending.saturating_add(class.unacked);
            self.backlog.with_label_values(&labels).set(i64::try_from(jobs).unwrap_or(i64::MAX));
        }
    }

    /// Counts a change of the number of workers.
    pub fn decided(&self, decision: &Decision) {
        let direction = if decision.replicas > decision.before { "up" } else { "down" };
        // Both words come from closed sets.
        self.decisions.with_label_values(&[direction, &format!("{:?}", decision.won)]).inc();
    }

    /// Forgets a model.
    pub fn forget(&self, model: &ModelRef) {
        let labels = [model.namespace.as_str(), model.name.as_str()];
        // A series that was never made cannot be removed, and need not be.
        let _ = self.desired.remove_label_values(&labels);
        let _ = self.ready.remove_label_values(&labels);
        for class in Class::ALL {
            let labels = [model.namespace.as_str(), model.name.as_str(), class.as_str()];
            let _ = self.backlog.remove_label_values(&labels);
        }
    }

    /// Sets the number of models known.
    pub fn count(&self, models: usize) {
        self.models.set(i64::try_from(models).unwrap_or(i64::MAX));
    }

    /// All of them in Prometheus' text form.
    pub fn text(&self) -> String {
        let mut text = Vec::new();
        // Writing to memory fails only for metrics without a name.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8(text).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use millrace_autoscaler::ClassReading;

    /// The series of a namespace on the page, without their values.
    fn series(metrics: &OperatorMetrics, namespace: &str) -> Vec<String> {
        let label = format!("namespace=\"{namespace}\"");
        let page = metrics.text();
        let lines = page.lines().filter(|line| line.contains(&label));
        lines.map(|line| line.rsplit_once(' ').expect("a value").0.to_owned()).collect()
    }

    #[test]
    fn a_forgotten_model_leaves_no_series() {
        let metrics = OperatorMetrics::new().unwrap();
        let [gone, stays] = ["gone", "stays"].map(|namespace| ModelRef::new(namespace, "m").unwrap());
        let class = |class| ClassReading { class, pending: 3, unacked: 4, oldest_age_ms: None };
        let queue = QueueReading { published: 9, classes: Class::ALL.map(class).to_vec() };
        for model in [&gone, &stays] {
            metrics.show(model, 2, 1, Some(&queue));
        }
        assert!(metrics.text().contains("millrace_desired_replicas{model=\"m\",namespace=\"gone\"} 2"));
        assert!(metrics.text().contains("millrace_backlog{class=\"low\",model=\"m\",namespace=\"gone\"} 7"));
        let made = series(&metrics, "stays");
        assert_eq!(made.len(), 2 + Class::ALL.len(), "{made:?}");
        assert_eq!(series(&metrics, "gone").len(), made.len());
        metrics.forget(&gone);
        assert_eq!(series(&metrics, "gone"), [""; 0]);
        assert_eq!(series(&metrics, "stays"), made, "another model of that name keeps its series");
    }
}
