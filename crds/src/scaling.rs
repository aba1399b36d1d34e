//! `spec.scaling` of an InferenceModel: how many workers, and how fast the number may change.
//!
//! [`ScalingSpec::check`] repeats in code what the schema says, because a file or an old API server can
//! bring a spec that no schema has seen. Nothing here decides; the operator's `scale` does.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::Span;

/// Most workers of one model. A bound on every list that the autoscaler keeps.
pub const REPLICAS_LIMIT: u32 = 1024;
/// Longest span in a scaling spec: a week. A longer one is a slip of the keyboard.
pub const SPAN_LIMIT: Span = Span::seconds(7 * 86_400);

/// How the number of workers follows the work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ScalingSpec {
    /// Fewest workers, even without work.
    #[schemars(range(min = 0, max = 1024))]
    pub min_replicas: u32,
    /// Most workers.
    #[schemars(range(min = 1, max = 1024))]
    pub max_replicas: u32,
    /// How long the model must have been without any work before the last worker goes. The default can be
    /// short, because the worker idles at least as long as starts of this model were seen to take (p90; 30s
    /// before the first), whatever is set here: a model whose starts are slow does not flap. Raise it where
    /// jobs that come minutes apart must not wait for a start; an idle GPU is paid for all that time.
    pub idle_after: Span,
    /// What the autoscaler aims at.
    pub targets: ScalingTargets,
    /// For how long a change must have been wanted before it is made.
    pub stabilization: Stabilization,
    /// Most workers added or removed within ten seconds.
    #[schemars(range(min = 1, max = 1024))]
    pub max_step: u32,
    /// What to do while the queue cannot be read.
    pub on_signal_lost: OnSignalLost,
}

impl Default for ScalingSpec {
    fn default() -> Self {
        Self {
            min_replicas: 0,
            max_replicas: 8,
            idle_after: Span::seconds(30),
            targets: ScalingTargets::default(),
            stabilization: Stabilization::default(),
            max_step: 4,
            on_signal_lost: OnSignalLost::Hold,
        }
    }
}

/// What the autoscaler aims at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct ScalingTargets {
    /// The time from a job's publication to its start that nineteen jobs of twenty are to stay within.
    /// Backlog that fits into it is let stand, because a worker with a backlog does not idle.
    pub queue_wait: Span,
    /// Share of the KV blocks that may be in use before a worker is added, while sequences wait for blocks
    /// inside of workers. Without such a wait, full blocks are what a busy worker looks like, and only
    /// `queueWait` adds workers.
    #[schemars(range(min = 0.1, max = 1.0))]
    pub kv_utilization: f64,
}

impl Default for ScalingTargets {
    fn default() -> Self {
        Self { queue_wait: Span::seconds(60), kv_utilization: 0.85 }
    }
}

/// For how long a change must have been wanted before it is made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Stabilization {
    /// Workers are added when that many were wanted during all of this span.
    pub up: Span,
    /// Workers are removed when no more were wanted during all of this span. The default is short, because it
    /// only guards against an odd reading: a worker that arrivals ask for again sooner than its restart would
    /// pay is kept in any case. Raise it to keep workers longer after a burst.
    pub down: Span,
}

impl Default for Stabilization {
    fn default() -> Self {
        Self { up: Span::seconds(0), down: Span::seconds(5) }
    }
}

/// What to do while the queue cannot be read. Unknown is never taken for zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum OnSignalLost {
    /// Keep the workers that are there.
    #[default]
    Hold,
    /// Go to `maxReplicas` step by step: latency before cost.
    Max,
}

/// Why a scaling spec was refused. Each message names the field, its value and the limit.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ScalingError {
    /// A number of workers is outside of its range.
    #[error("scaling.{field} is {value}; it must be between {least} and {most}")]
    Count {
        /// The field's path below `spec.scaling`.
        field: &'static str,
        /// Its value.
        value: u32,
        /// The least that is allowed.
        least: u32,
        /// The most that is allowed.
        most: u32,
    },
    /// A span is outside of its range.
    #[error("scaling.{field} is {value}; it must be between {least} and {most}")]
    Length {
        /// The field's path below `spec.scaling`.
        field: &'static str,
        /// Its value.
        value: Span,
        /// The shortest that is allowed.
        least: Span,
        /// The longest that is allowed.
        most: Span,
    },
    /// The share of KV blocks makes no sense.
    #[error("scaling.targets.kvUtilization is {0}; it must be between 0.1 and 1.0")]
    KvUtilization(f64),
}

impl ScalingSpec {
    /// Refuses what the autoscaler cannot work with.
    pub fn check(&self) -> Result<(), ScalingError> {
        let count = |field, value, least, most| match (least..=most).contains(&value) {
            true => Ok(()),
            false => Err(ScalingError::Count { field, value, least, most }),
        };
        let length = |field, value: Span, least: Span| match (least..=SPAN_LIMIT).contains(&value) {
            true => Ok(()),
            false => Err(ScalingError::Length { field, value, least, most: SPAN_LIMIT }),
        };
        count("maxReplicas", self.max_replicas, 1, REPLICAS_LIMIT)?;
        count("minReplicas", self.min_replicas, 0, self.max_replicas)?;
        count("maxStep", self.max_step, 1, REPLICAS_LIMIT)?;
        length("idleAfter", self.idle_after, Span::seconds(0))?;
        length("targets.queueWait", self.targets.queue_wait, Span::seconds(1))?;
        length("stabilization.up", self.stabilization.up, Span::seconds(0))?;
        length("stabilization.down", self.stabilization.down, Span::seconds(0))?;
        match (0.1..=1.0).contains(&self.targets.kv_utilization) {
            true => Ok(()),
            false => Err(ScalingError::KvUtilization(self.targets.kv_utilization)),
        }
    }

    /// The warning for an `idleAfter` that is shorter than a start of this model was seen to take, and so has
    /// no effect.
    pub fn idle_warning(&self, cold_start_p90: Span) -> Option<String> {
        (self.min_replicas == 0 && self.idle_after < cold_start_p90).then(|| {
            format!(
                "scaling.idleAfter is {}, shorter than the cold start of this model ({} at p90), for which the \
                 last worker idles instead: set it to at least {}, or minReplicas to 1",
                self.idle_after, cold_start_p90, cold_start_p90
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_spec_is_the_default_and_passes() {
        let spec: ScalingSpec = serde_json::from_str("{}").unwrap();
        assert_eq!(spec, ScalingSpec::default());
        spec.check().unwrap();
    }

    #[test]
    fn the_written_form_is_read() {
        let text = r#"{"minReplicas": 0, "maxReplicas": 8, "idleAfter": "30s",
            "targets": {"queueWait": "60s", "kvUtilization": 0.85},
            "stabilization": {"up": "0s", "down": "5s"}, "maxStep": 4, "onSignalLost": "Hold"}"#;
        let spec: ScalingSpec = serde_json::from_str(text).unwrap();
        assert_eq!(spec, ScalingSpec::default());
        assert!(serde_json::from_str::<ScalingSpec>(r#"{"minReplica": 1}"#).is_err());
        assert!(serde_json::from_str::<ScalingSpec>(r#"{"onSignalLost": "Zero"}"#).is_err());
    }

    #[test]
    fn refusals_name_field_value_and_limit() {
        type Edit = fn(&mut ScalingSpec);
        let cases: [(Edit, &[&str]); 6] = [
            (|s| s.max_replicas = 0, &["maxReplicas", "0", "1"]),
            (|s| s.min_replicas = 9, &["minReplicas", "9", "8"]),
            (|s| s.max_step = 0, &["maxStep", "0", "1"]),
            (|s| s.targets.queue_wait = Span::seconds(0), &["targets.queueWait", "0s", "1s"]),
            (|s| s.idle_after = Span::seconds(10_000_000), &["idleAfter", "168h"]),
            (|s| s.targets.kv_utilization = 1.5, &["kvUtilization", "1.5", "1.0"]),
        ];
        for (edit, words) in cases {
            let mut spec = ScalingSpec::default();
            edit(&mut spec);
            let message = spec.check().unwrap_err().to_string();
            for word in words {
                assert!(message.contains(word), "{message:?} lacks {word:?}");
            }
        }
    }

    #[test]
    fn a_short_idle_span_warns() {
        let spec = ScalingSpec { idle_after: Span::seconds(20), ..Default::default() };
        assert!(spec.idle_warning(Span::seconds(45)).unwrap().contains("45s"));
        assert_eq!(spec.idle_warning(Span::seconds(20)), None);
        assert_eq!(ScalingSpec { min_replicas: 1, ..spec }.idle_warning(Span::seconds(45)), None);
    }
}
