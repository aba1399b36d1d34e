//! Creates the streams and consumers of a model, or says where existing ones differ.
//!
//! What is missing is created. What is there is compared with the settings of
//! [`millrace_crds::streams`]: settings that the broker lets change are brought in line when asked to, and
//! nothing is ever deleted. The operator does this in a cluster; the worker does it when `nats.provision`
//! is set, and the command line's `provision` does the same.

use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::stream::Config;
use async_nats::jetstream::{self, Context, ErrorCode};
use millrace_crds::config::{QueueConfig, ResultsConfig};
use millrace_crds::names::{Class, ModelRef};
use millrace_crds::streams;

/// What to do about streams and consumers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Only look.
    Check,
    /// Create what is missing; leave what differs.
    Create,
    /// Create what is missing and update what differs.
    Apply,
}

/// What one stream or consumer was found to be, or was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// As it should be.
    Same,
    /// Not there, and it was not asked to be created.
    Missing,
    /// Created now.
    Created,
    /// Updated now; the settings that differed.
    Updated(Vec<Drift>),
    /// It differs, and was left so.
    Differs(Vec<Drift>),
}

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

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// `stream NAME` or `consumer STREAM/NAME`.
    pub name: String,
    /// What it is now.
    pub state: State,
}

/// Why provisioning stopped.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {message}")]
pub struct ProvisionError {
    /// The stream or consumer.
    pub name: String,
    /// What the broker said.
    pub message: String,
}

/// Looks at, creates or updates the three streams and three consumers of a model, in that order.
///
/// # Errors
/// When the broker refuses or does not answer. What was done before stays done; it may be run again.
pub async fn provision(
    context: &Context,
    model: &ModelRef,
    queue: &QueueConfig,
    results: &ResultsConfig,
    mode: Mode,
) -> Result<Vec<Item>, ProvisionError> {
    let mut report = Vec::new();
    let wanted = [
        streams::jobs(model, queue),
        streams::results(model, queue, results),
        streams::dead(model, queue, results),
    ];
    for config in wanted {
        report.push(stream(context, config, mode).await?);
    }
    let jobs_missing = report.first().is_some_and(|item| item.state == State::Missing);
    for class in Class::ALL {
        let config = streams::consumer(model, class, queue);
        let name = format!("consumer {}/{}", model.jobs_stream(), model.consumer(class));
        let state = if jobs_missing {
            State::Missing
        } else {
            consumer(context, &model.jobs_stream(), config, mode)
                .await
                .map_err(|message| ProvisionError { name: name.clone(), message })?
        };
        report.push(Item { name, state });
    }
    Ok(report)
}

async fn stream(context: &Context, wanted: Config, mode: Mode) -> Result<Item, ProvisionError> {
    let name = format!("stream {}", wanted.name);
    let fail = |message: String| ProvisionError { name: name.clone(), message };
    let actual = match context.get_stream(&wanted.name).await {
        Ok(found) => Some(found.cached_info().config.clone()),
        Err(error) => match error.kind() {
            jetstream::context::GetStreamErrorKind::JetStream(inner)
                if inner.error_code() == ErrorCode::STREAM_NOT_FOUND =>
            {
                None
            }
            _ => return Err(fail(error.to_string())),
        },
    };
    let state = match (actual, mode) {
        (None, Mode::Check) => State::Missing,
        (None, _) => {
            context.create_stream(wanted).await.map_err(|error| fail(error.to_string()))?;
            State::Created
        }
        (Some(actual), _) => match (stream_drift(&actual, &wanted), mode) {
            (drift, _) if drift.is_empty() => State::Same,
            (drift, Mode::Apply) => {
                context.update_stream(wanted).await.map_err(|error| fail(error.to_string()))?;
                State::Updated(drift)
            }
            (drift, _) => State::Differs(drift),
        },
    };
    Ok(Item { name, state })
}

async fn consumer(
    context: &Context,
    stream: &str,
    wanted: pull::Config,
    mode: Mode,
) -> Result<State, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let jobs = context.get_stream_no_info(stream).await.map_err(|e| text(&e))?;
    let name = wanted.durable_name.clone().unwrap_or_default();
    let actual = match jobs.consumer_info(&name).await {
        Ok(info) => Some(info.config),
        Err(error) => match error.kind() {
            jetstream::context::ConsumerInfoErrorKind::NotFound => None,
            _ => return Err(text(&error)),
        },
    };
    match (actual, mode) {
        (None, Mode::Check) => Ok(State::Missing),
        (None, _) => {
            jobs.create_consumer(wanted).await.map_err(|e| text(&e))?;
            Ok(State::Created)
        }
        (Some(actual), _) => match (consumer_drift(&actual, &wanted), mode) {
            (drift, _) if drift.is_empty() => Ok(State::Same),
            (drift, Mode::Apply) => {
                jobs.create_consumer(wanted).await.map_err(|e| text(&e))?;
                Ok(State::Updated(drift))
            }
            (drift, _) => Ok(State::Differs(drift)),
        },
    }
}

fn compare<T: PartialEq + std::fmt::Debug>(drift: &mut Vec<Drift>, setting: &'static str, pair: (&T, &T)) {
    let (actual, expected) = pair;
    if actual != expected {
        drift.push(Drift { setting, actual: format!("{actual:?}"), expected: format!("{expected:?}") });
    }
}

/// The settings that the promises rest on; defaults that the broker fills in are not compared.
fn stream_drift(actual: &Config, wanted: &Config) -> Vec<Drift> {
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
    drift
}

fn consumer_drift(actual: &jetstream::consumer::Config, wanted: &pull::Config) -> Vec<Drift> {
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
    use super::*;

    #[test]
    fn drift_names_the_setting_and_both_values() {
        let model = ModelRef::new("default", "m").unwrap();
        let queue = QueueConfig::default();
        let wanted = streams::jobs(&model, &queue);
        assert!(stream_drift(&wanted, &wanted).is_empty());
        let other = streams::jobs(&model, &QueueConfig { max_jobs: 5, ..queue });
        let drift = stream_drift(&other, &wanted);
        assert_eq!(drift, [Drift { setting: "max_msgs", actual: "5".into(), expected: "1000000".into() }]);
    }
}
