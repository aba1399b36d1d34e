//! Creates the streams and consumers of a model, or says where existing ones differ.
//!
//! What is missing is created. What is there is compared with the settings of
//! [`millrace_crds::streams`]: settings that the broker lets change are brought in line when asked to, and
//! nothing is ever deleted but a consumer that leaves jobs behind, which is made anew at once. Metadata that others put
//! on them stays. The operator does this in a cluster; the worker does it when `nats.provision` is set, and the command
//! line's `provision` does the same.

use std::collections::HashMap;

use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::context::{ConsumerInfoErrorKind, GetStreamErrorKind};
use async_nats::jetstream::stream::Config;
use async_nats::jetstream::{Context, ErrorCode};
use millrace_crds::config::{QueueConfig, ResultsConfig};
use millrace_crds::drift::{self, Drift};
use millrace_crds::names::{Class, ModelRef};
use millrace_crds::streams;

/// What keys of metadata begin with that the broker adds by itself.
const BROKER_KEYS: &str = "_nats.";

/// What to do about streams and consumers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Only look.
    Check,
    /// Create what is missing; leave what differs.
    Create,
    /// Create what is missing and update what differs, but shorten no ack wait: workers that were started with the
    /// longer one send their keep-alives at its pace, and would lose what they hold.
    ApplyUnderWorkers,
    /// Create what is missing and update what differs.
    Apply,
}

impl Mode {
    fn updates(self) -> bool {
        matches!(self, Mode::Apply | Mode::ApplyUnderWorkers)
    }
}

/// What one stream or consumer was found to be, or was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Provisioned {
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

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// `stream NAME` or `consumer STREAM/NAME`.
    pub name: String,
    /// What it is now.
    pub state: Provisioned,
}

/// Why provisioning stopped.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {message}")]
pub struct ProvisionError {
    /// The stream or consumer.
    pub name: String,
    /// What the broker said.
    pub message: String,
    /// Whether it answered at all.
    pub answered: bool,
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
        streams::jobs(model, queue, results),
        streams::results(model, queue, results),
        streams::dead(model, queue, results),
    ];
    for config in wanted {
        report.push(stream(context, config, mode).await?);
    }
    let jobs_missing = report.first().is_some_and(|item| item.state == Provisioned::Missing);
    for class in Class::ALL {
        let wanted = streams::consumer(model, class, queue);
        let place = Place { context, stream: model.jobs_stream(), name: model.consumer(class) };
        let state = if jobs_missing { Provisioned::Missing } else { place.consumer(wanted, mode).await? };
        report.push(Item { name: place.shown(), state });
    }
    Ok(report)
}

async fn stream(context: &Context, mut wanted: Config, mode: Mode) -> Result<Item, ProvisionError> {
    let name = format!("stream {}", wanted.name);
    let refused = |error: &dyn std::fmt::Display| ProvisionError {
        name: name.clone(),
        message: error.to_string(),
        answered: true,
    };
    let actual = match context.get_stream(&wanted.name).await {
        Ok(found) => Some(found.cached_info().config.clone()),
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(inner) if inner.error_code() == ErrorCode::STREAM_NOT_FOUND => None,
            kind => {
                let answered = matches!(kind, GetStreamErrorKind::JetStream(_));
                return Err(ProvisionError { name, message: error.to_string(), answered });
            }
        },
    };
    let state = match (actual, mode) {
        (None, Mode::Check) => Provisioned::Missing,
        (None, _) => {
            context.create_stream(wanted).await.map_err(|error| refused(&error))?;
            Provisioned::Created
        }
        (Some(actual), _) => match drift::stream(&actual, &wanted) {
            drift if drift.is_empty() => Provisioned::Same,
            drift if mode.updates() => {
                wanted.metadata = kept(&actual.metadata);
                context.update_stream(wanted).await.map_err(|error| refused(&error))?;
                Provisioned::Updated(drift)
            }
            drift => Provisioned::Differs(drift),
        },
    };
    Ok(Item { name, state })
}

/// Where a consumer is.
struct Place<'a> {
    context: &'a Context,
    stream: String,
    name: String,
}

impl Place<'_> {
    fn shown(&self) -> String {
        format!("consumer {}/{}", self.stream, self.name)
    }

    fn failed(&self, error: &dyn std::fmt::Display, answered: bool) -> ProvisionError {
        ProvisionError { name: self.shown(), message: error.to_string(), answered }
    }

    async fn consumer(&self, mut wanted: pull::Config, mode: Mode) -> Result<Provisioned, ProvisionError> {
        let refused = |error: &dyn std::fmt::Display| self.failed(error, true);
        let jobs = self.context.get_stream_no_info(&self.stream).await;
        let jobs = jobs.map_err(|error| self.failed(&error, false))?;
        let actual = match jobs.consumer_info(&self.name).await {
            Ok(info) => info.config,
            Err(error) => match (error.kind(), mode) {
                (ConsumerInfoErrorKind::NotFound, Mode::Check) => return Ok(Provisioned::Missing),
                (ConsumerInfoErrorKind::NotFound, _) => {
                    jobs.create_consumer(wanted).await.map_err(|error| refused(&error))?;
                    return Ok(Provisioned::Created);
                }
                (kind, _) => {
                    let answered = matches!(kind, ConsumerInfoErrorKind::JetStream(_));
                    return Err(self.failed(&error, answered));
                }
            },
        };
        if mode == Mode::ApplyUnderWorkers {
            wanted.ack_wait = wanted.ack_wait.max(actual.ack_wait);
        }
        let drift = drift::consumer(&actual, &wanted);
        if drift.is_empty() {
            return Ok(Provisioned::Same);
        }
        if !mode.updates() {
            return Ok(Provisioned::Differs(drift));
        }
        if drift::leaves_jobs_behind(&drift) {
            jobs.delete_consumer(&self.name).await.map_err(|error| refused(&error))?;
        }
        wanted.metadata = kept(&actual.metadata);
        jobs.create_consumer(wanted).await.map_err(|error| refused(&error))?;
        Ok(Provisioned::Updated(drift))
    }
}

/// The metadata that somebody else wrote: all but what the broker itself adds.
fn kept(actual: &HashMap<String, String>) -> HashMap<String, String> {
    let others = actual.iter().filter(|(key, _)| !key.starts_with(BROKER_KEYS));
    others.map(|(key, value)| (key.clone(), value.clone())).collect()
}
