//! Streams and consumers: the only file that has them made and repaired, reads and deletes them.
//!
//! What is missing is created, what differs is put right where the broker lets it (both by
//! [`millrace_queue::provision`]), and both are reported. Streams are deleted only for a model that says so. Every
//! answer comes from the leader of a stream or consumer, through the JetStream API. A read that fails is a failure,
//! never a zero.

use std::time::Duration;

use async_nats::Client;
use async_nats::jetstream::context::{ConsumerInfoErrorKind, GetStreamErrorKind};
use async_nats::jetstream::stream::{Config, State};
use async_nats::jetstream::{Context, ErrorCode, consumer};
use futures::future::try_join_all;
use k8s_openapi::jiff::Timestamp;
use millrace_autoscaler::{ClassReading, QueueReading};
use millrace_crds::backlog::{self, StreamCount};
use millrace_crds::config::{QueueConfig, ResultsConfig};
use millrace_crds::names::{Class, ModelRef};
use millrace_queue::broker::BrokerError;
use millrace_queue::link::{Access, Link, Profile};
use millrace_queue::provision::{Item, Mode, ProvisionError, Provisioned, provision};
use tokio::sync::watch;

use crate::config;

/// How long one request may take. A reconcile makes a few in a row, and other models wait behind it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// Commands that may wait for the connection.
const COMMANDS_MAX: usize = 4096;
/// Messages that may wait for one subscriber: load reports of a thousand workers for some seconds.
const SUBSCRIPTION_MAX: usize = 8192;
/// How long a start waits for the broker, so that a restart does not report a broker that is only not there yet.
const FIRST_CONNECTION_WAIT: Duration = Duration::from_secs(5);

/// Why the broker did not do as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// No answer.
    #[error("the broker does not answer: {0}")]
    Unreachable(String),
    /// A refusal.
    #[error("{name}: {message}")]
    Refused {
        /// The stream or consumer.
        name: String,
        /// What the broker said.
        message: String,
    },
    /// A stream or consumer is not there.
    #[error("{0} is missing")]
    Missing(String),
}

/// The connection to the broker. Cheap to clone.
#[derive(Debug, Clone)]
pub struct QueueClient {
    link: Link,
    context: Context,
}

/// What keeps jobs from workers while the queue is as it should be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct QueueHealth {
    /// Consumers that somebody paused, and until when their pause lasts.
    pub paused: Vec<String>,
    /// Jobs that wait behind them.
    pub held_back: u64,
    /// Jobs that no consumer will deliver; `None` if jobs came or went while they were counted.
    pub undeliverable: Option<u64>,
}

/// One thing that was put right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// The stream or consumer.
    pub name: String,
    /// What was done.
    pub what: String,
    /// Whether it had been there before; a first creation is no repair.
    pub existed: bool,
}

impl QueueClient {
    /// Connects, and stays connected: waits for a broker that is not there yet, and comes back to one that
    /// went away.
    ///
    /// # Errors
    /// When an address, the login or a certificate is wrong.
    pub async fn connect(config: &config::Config) -> Result<Self, BrokerError> {
        let profile = Profile {
            name: format!("millrace-operator {}", config.identity),
            inbox_prefix: "_INBOX.operator".into(),
            request_timeout: REQUEST_TIMEOUT,
            commands_max: COMMANDS_MAX,
            messages_max: SUBSCRIPTION_MAX,
        };
        let link = Link::hold(&Access::of(&config.nats())?, &profile).await?;
        Ok(Self { context: link.jetstream(), link })
    }

    /// The connection.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// The client underneath.
    pub fn client(&self) -> &Client {
        self.link.client()
    }

    /// Counts the connections made: a change says that messages may have been missed.
    pub fn connections(&self) -> watch::Receiver<u64> {
        self.link.connections()
    }

    /// Waits for the first connection, but not for ever: a model's objects are kept without a broker too.
    pub async fn first_connection(&self) {
        let mut connections = self.connections();
        let connected = connections.wait_for(|&count| count > 0);
        if tokio::time::timeout(FIRST_CONNECTION_WAIT, connected).await.is_err() {
            tracing::warn!("the broker does not answer after {FIRST_CONNECTION_WAIT:?}; going on without");
        }
    }

    /// Whether the connection stands. Without one, requests would only wait.
    pub fn connected(&self) -> bool {
        self.link.connected()
    }

    fn reachable(&self) -> Result<(), QueueError> {
        match self.connected() {
            true => Ok(()),
            false => {
                let reason = self.link.trouble().map_or(String::new(), |reason| format!(": {reason}"));
                Err(QueueError::Unreachable(format!("not connected{reason}")))
            }
        }
    }

    /// Makes the streams and consumers of a model what they should be. Returns what had to be done.
    ///
    /// Unless all workers have `rolled` to the present spec, an ack wait is not shortened: those of the former spec
    /// send their keep-alives at the former pace, and would lose what they hold.
    ///
    /// # Errors
    /// When the broker refuses or does not answer. What was done before stays done.
    pub async fn provision(
        &self,
        model: &ModelRef,
        queue: &QueueConfig,
        results: &ResultsConfig,
        rolled: bool,
    ) -> Result<Vec<Repair>, QueueError> {
        self.reachable()?;
        let mode = if rolled { Mode::Apply } else { Mode::ApplyUnderWorkers };
        let done = provision(&self.context, model, queue, results, mode).await?;
        Ok(done.into_iter().filter_map(repair).collect())
    }

    /// A stream's settings and state, `None` if there is no such stream.
    async fn stream(&self, name: &str) -> Result<Option<(Config, State)>, QueueError> {
        match self.context.get_stream(name).await {
            Ok(stream) => {
                let info = stream.cached_info();
                Ok(Some((info.config.clone(), info.state.clone())))
            }
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(inner) if inner.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                    Ok(None)
                }
                GetStreamErrorKind::JetStream(inner) => {
                    Err(QueueError::Refused { name: format!("stream {name}"), message: inner.to_string() })
                }
                _ => Err(QueueError::Unreachable(error.to_string())),
            },
        }
    }

    async fn consumer(&self, model: &ModelRef, class: Class) -> Result<consumer::Info, QueueError> {
        let (stream, name) = (model.jobs_stream(), model.consumer(class));
        let what = format!("consumer {stream}/{name}");
        let handle = self.context.get_stream_no_info(&stream).await;
        let handle = handle.map_err(|error| QueueError::Unreachable(error.to_string()))?;
        handle.consumer_info(&name).await.map_err(|error| match error.kind() {
            ConsumerInfoErrorKind::NotFound => QueueError::Missing(what),
            ConsumerInfoErrorKind::JetStream(inner) => {
                QueueError::Refused { name: what, message: inner.to_string() }
            }
            _ => QueueError::Unreachable(error.to_string()),
        })
    }

    /// Reads the backlog of a model, and what keeps jobs from its workers. An empty stream needs one request, others
    /// one more for each class, and a second look at the stream. Jobs behind a paused consumer are none that a further
    /// worker would get, so they are no backlog.
    ///
    /// # Errors
    /// When any part could not be read: half a reading is none.
    pub async fn read(&self, model: &ModelRef) -> Result<(QueueReading, QueueHealth), QueueError> {
        self.reachable()?;
        let stream = model.jobs_stream();
        let Some((_, state)) = self.stream(&stream).await? else {
            return Err(QueueError::Missing(format!("stream {stream}")));
        };
        let published = state.last_sequence;
        if state.messages == 0 {
            let classes =
                Class::ALL.map(|class| ClassReading { class, pending: 0, unacked: 0, oldest_age_ms: None });
            let health = QueueHealth { undeliverable: Some(0), ..QueueHealth::default() };
            return Ok((QueueReading { published, classes: classes.to_vec() }, health));
        }
        let infos = try_join_all(Class::ALL.map(|class| self.consumer(model, class))).await?;
        let oldest_ms = age_ms(&state);
        let unacked: u64 = infos.iter().map(|info| info.num_ack_pending as u64).sum();
        let waiting = infos.iter().filter(|info| info.num_pending > 0).count();
        let after = self
            .stream(&stream)
            .await?
            .map_or(StreamCount { messages: 0, last_sequence: 0 }, |s| count(&s.1));
        let health = health(&infos, backlog::undeliverable(count(&state), after, known(&infos)));
        let classes = Class::ALL.into_iter().zip(&infos).map(|(class, info)| ClassReading {
            class,
            pending: if info.paused { 0 } else { info.num_pending },
            unacked: info.num_ack_pending as u64,
            // The stream's oldest job is this class's oldest pending one only where nothing else is in it.
            oldest_age_ms: oldest_ms.filter(|_| unacked == 0 && waiting == 1 && info.num_pending > 0),
        });
        Ok((QueueReading { published, classes: classes.collect() }, health))
    }

    /// Deletes the streams of a model, with all jobs and outcomes. Those that are gone are gone.
    ///
    /// # Errors
    /// When the broker refuses or does not answer.
    pub async fn delete(&self, model: &ModelRef) -> Result<(), QueueError> {
        self.reachable()?;
        for name in [model.jobs_stream(), model.results_stream(), model.dead_stream()] {
            if self.stream(&name).await?.is_some() {
                let deleted = self.context.delete_stream(&name).await;
                deleted.map_err(|error| refused(&format!("stream {name}"), &error))?;
            }
        }
        Ok(())
    }
}

fn count(state: &State) -> StreamCount {
    StreamCount { messages: state.messages, last_sequence: state.last_sequence }
}

/// Jobs that the consumers will deliver, or have delivered.
fn known(infos: &[consumer::Info]) -> u64 {
    infos.iter().map(|info| info.num_pending.saturating_add(info.num_ack_pending as u64)).sum()
}

fn health(infos: &[consumer::Info], undeliverable: Option<u64>) -> QueueHealth {
    let paused: Vec<&consumer::Info> = infos.iter().filter(|info| info.paused).collect();
    let until = |info: &&consumer::Info| match info.pause_remaining {
        Some(left) => format!("{} for {} s more", info.name, left.as_secs()),
        None => info.name.clone(),
    };
    QueueHealth {
        paused: paused.iter().map(until).collect(),
        held_back: paused.iter().map(|info| info.num_pending).sum(),
        undeliverable,
    }
}

fn age_ms(state: &State) -> Option<u64> {
    let first_ms = state.first_timestamp.unix_timestamp_nanos() / 1_000_000;
    let age_ms = i128::from(Timestamp::now().as_millisecond()) - first_ms;
    u64::try_from(age_ms).ok()
}

fn refused(name: &str, error: &dyn std::fmt::Display) -> QueueError {
    QueueError::Refused { name: name.to_owned(), message: error.to_string() }
}

fn repair(item: Item) -> Option<Repair> {
    let name = item.name;
    match item.state {
        Provisioned::Created => {
            Some(Repair { name, what: "was missing and was created".into(), existed: false })
        }
        Provisioned::Updated(drift) => {
            let parts: Vec<String> = drift.iter().map(ToString::to_string).collect();
            let what = format!("differed and was put right: {}", parts.join("; "));
            Some(Repair { name, what, existed: true })
        }
        Provisioned::Same | Provisioned::Missing | Provisioned::Differs(_) => None,
    }
}

impl From<ProvisionError> for QueueError {
    fn from(error: ProvisionError) -> Self {
        match error.answered {
            true => QueueError::Refused { name: error.name, message: error.message },
            false => QueueError::Unreachable(error.to_string()),
        }
    }
}
