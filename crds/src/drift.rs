//! Where a stream or consumer differs from what it should be.
//!
//! Compared are the settings that the promises rest on; defaults that the broker fills in are not. Pure: the
//! operator, the worker and the command line all look with these eyes, and each decides what to do.

use async_nats::jetstream::consumer;
use async_nats::jetstream::stream::Config;

/// One setting that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drift {
    /// The setting, by the broker's name.
    pub setting: &'static str,
    /// What it is.
    pub actual: String,
    /// What it should be.
    pub expected: String,
}

impl std::fmt::Display for Drift {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} is {}, not {}", self.setting, self.actual, self.expected)
    }
}

fn compare<T: PartialEq + std::fmt::Debug>(drift: &mut Vec<Drift>, setting: &'static str, pair: (&T, &T)) {
    let (actual, expected) = pair;
    if actual != expected {
        drift.push(Drift { setting, actual: format!("{actual:?}"), expected: format!("{expected:?}") });
    }
}

/// Where a stream differs from what it should be.
pub fn stream(actual: &Config, wanted: &Config) -> Vec<Drift> {
    let mut drift = Vec::new();
    let sorted = |config: &Config| {
        let mut subjects: Vec<String> = config.subjects.iter().map(ToString::to_string).collect();
        subjects.sort();
        subjects
    };
    compare(&mut drift, "subjects", (&sorted(actual), &sorted(wanted)));
    compare(&mut drift, "retention", (&actual.retention, &wanted.retention));
    compare(&mut drift, "storage", (&actual.storage, &wanted.storage));
    compare(&mut drift, "discard", (&actual.discard, &wanted.discard));
    let unlimited = |value: i64| if value <= 0 { -1 } else { value };
    compare(&mut drift, "max_msgs", (&unlimited(actual.max_messages), &unlimited(wanted.max_messages)));
    compare(&mut drift, "max_bytes", (&unlimited(actual.max_bytes), &unlimited(wanted.max_bytes)));
    compare(
        &mut drift,
        "max_msgs_per_subject",
        (&unlimited(actual.max_messages_per_subject), &unlimited(wanted.max_messages_per_subject)),
    );
    let size = |config: &Config| unlimited(config.max_message_size.into());
    compare(&mut drift, "max_msg_size", (&size(actual), &size(wanted)));
    compare(&mut drift, "max_age", (&actual.max_age, &wanted.max_age));
    compare(&mut drift, "duplicate_window", (&actual.duplicate_window, &wanted.duplicate_window));
    compare(&mut drift, "num_replicas", (&actual.num_replicas, &wanted.num_replicas));
    compare(&mut drift, "allow_direct", (&actual.allow_direct, &wanted.allow_direct));
    compare(&mut drift, "allow_msg_ttl", (&actual.allow_message_ttl, &wanted.allow_message_ttl));
    let marker = |config: &Config| config.subject_delete_marker_ttl.unwrap_or_default();
    compare(&mut drift, "subject_delete_marker_ttl", (&marker(actual), &marker(wanted)));
    drift
}

/// Whether a consumer that differs so must be made anew: what it gave up under a delivery limit of its own stays
/// undelivered, whatever the limit is changed to (seen with nats-server 2.15.1).
pub fn leaves_jobs_behind(drift: &[Drift]) -> bool {
    drift.iter().any(|drift| drift.setting == "max_deliver")
}

/// Where a consumer differs from what it should be.
pub fn consumer(actual: &consumer::Config, wanted: &consumer::pull::Config) -> Vec<Drift> {
    let mut drift = Vec::new();
    compare(&mut drift, "filter_subject", (&actual.filter_subject, &wanted.filter_subject));
    compare(&mut drift, "ack_policy", (&actual.ack_policy, &wanted.ack_policy));
    compare(&mut drift, "ack_wait", (&actual.ack_wait, &wanted.ack_wait));
    compare(&mut drift, "max_deliver", (&actual.max_deliver, &wanted.max_deliver));
    compare(&mut drift, "max_ack_pending", (&actual.max_ack_pending, &wanted.max_ack_pending));
    compare(&mut drift, "max_batch", (&actual.max_batch, &wanted.max_batch));
    drift
}

#[cfg(test)]
mod tests {
    use async_nats::jetstream::consumer::IntoConsumerConfig;

    use super::*;
    use crate::config::{QueueConfig, ResultsConfig};
    use crate::names::{Class, ModelRef};
    use crate::streams;

    #[test]
    fn drift_names_the_setting_and_both_values() {
        let model = ModelRef::new("default", "m").unwrap();
        let (queue, results) = (QueueConfig::default(), ResultsConfig::default());
        let wanted = streams::jobs(&model, &queue, &results);
        assert!(stream(&wanted, &wanted).is_empty());
        let other = streams::jobs(&model, &QueueConfig { max_jobs: 5, ..queue.clone() }, &results);
        let drift = stream(&other, &wanted);
        assert_eq!(drift, [Drift { setting: "max_msgs", actual: "5".into(), expected: "1000000".into() }]);
        assert_eq!(drift[0].to_string(), "max_msgs is 5, not 1000000");
        let wanted = streams::consumer(&model, Class::High, &queue);
        let actual = consumer::Config {
            ack_wait: std::time::Duration::from_secs(1),
            ..wanted.clone().into_consumer_config()
        };
        let drift = consumer(&actual, &wanted);
        assert_eq!((drift[0].setting, leaves_jobs_behind(&drift)), ("ack_wait", false));
        let limited = consumer::Config { max_deliver: 3, ..wanted.clone().into_consumer_config() };
        assert!(leaves_jobs_behind(&consumer(&limited, &wanted)));
    }
}
