//! Creates the streams and consumers of a model, or says where existing ones differ.
//!
//! What is missing is created. What is there is compared with the settings of
//! [`millrace_crds::streams`]: settings that the broker lets change are brought in line when asked to, and
//! nothing is ever deleted but a consumer that leaves jobs behind, which is made anew at once. The operator does this
//! in a cluster; the worker does it when `nats.provision` is set, and the command line's `provision` does the same.

use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::stream::Config;
use async_nats::jetstream::{self, Context, ErrorCode};
use millrace_crds::config::{QueueConfig, ResultsConfig};
use millrace_crds::drift::{self, Drift};
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
        let config = streams::consumer(model, class, queue);
        let name = format!("consumer {}/{}", model.jobs_stream(), model.consumer(class));
        let state = if jobs_missing {
            Provisioned::Missing
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
        (None, Mode::Check) => Provisioned::Missing,
        (None, _) => {
            context.create_stream(wanted).await.map_err(|error| fail(error.to_string()))?;
            Provisioned::Created
        }
        (Some(actual), _) => match (drift::stream(&actual, &wanted), mode) {
            (drift, _) if drift.is_empty() => Provisioned::Same,
            (drift, Mode::Apply) => {
                context.update_stream(wanted).await.map_err(|error| fail(error.to_string()))?;
                Provisioned::Updated(drift)
            }
            (drift, _) => Provisioned::Differs(drift),
        },
    };
    Ok(Item { name, state })
}

async fn consumer(
    context: &Context,
    stream: &str,
    wanted: pull::Config,
    mode: Mode,
) -> Result<Provisioned, String> {
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
        (None, Mode::Check) => Ok(Provisioned::Missing),
        (None, _) => {
            jobs.create_consumer(wanted).await.map_err(|e| text(&e))?;
            Ok(Provisioned::Created)
        }
        (Some(actual), _) => match (drift::consumer(&actual, &wanted), mode) {
            (drift, _) if drift.is_empty() => Ok(Provisioned::Same),
            (drift, Mode::Apply) => {
                if drift::leaves_jobs_behind(&drift) {
                    jobs.delete_consumer(&name).await.map_err(|e| text(&e))?;
                }
                jobs.create_consumer(wanted).await.map_err(|e| text(&e))?;
                Ok(Provisioned::Updated(drift))
            }
            (drift, _) => Ok(Provisioned::Differs(drift)),
        },
    }
}
