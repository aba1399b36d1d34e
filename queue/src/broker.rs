//! The broker: the four things that the protocol asks of it, over a [`Link`].
//!
//! Each of them says what really happened. A read tells "absent" from "could not be read". A create tells
//! "stored" from "somebody else was first". An ack is a request that demands an empty success reply,
//! because a client library's confirmed ack was seen to report success when there was no consumer.
//! Nothing here retries without a bound: what stands between a job and its answer is tried for [`PATIENCE`],
//! so that a restart of the broker or the election of a leader does not throw a computed answer away.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::response::Response;
use async_nats::{Client, HeaderMap, Message, Request, StatusCode};
use bytes::Bytes;
use millrace_crds::config::NatsConfig;
use millrace_crds::names::{ModelRef, SubjectToken};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;

use crate::link::{Access, Link, Profile};

/// How long one request to the broker may take.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a look-up or a create is tried while the broker does not answer it. Longer than a broker takes
/// to restart or to elect a leader, and short beside the time that a job's answer may have cost.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How often an ack is tried. An unconfirmed one costs only a redelivery that finds the outcome.
const ACK_TRIES: u32 = 4;
/// Pause before the second try, and the end of its doubling.
const TRY_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Commands that may wait for the connection; more publishers wait.
const COMMANDS_MAX: usize = 8192;
/// Messages that may wait for one subscriber. Above what all pulls together ask for.
const SUBSCRIPTION_MAX: usize = 65_536;

/// Why the broker did not do as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// The configuration of the connection is wrong.
    #[error("nats.{field}: {message}")]
    Config {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// No answer, or one that says that it failed.
    #[error("{what}: {message}")]
    Request {
        /// What was asked.
        what: &'static str,
        /// What came back.
        message: String,
    },
    /// A message is larger than the broker takes.
    #[error("a message of {bytes} bytes exceeds the broker's max_payload of {limit} bytes")]
    TooLarge {
        /// Its size with headers.
        bytes: usize,
        /// The broker's limit.
        limit: usize,
    },
    /// The stream was made before its messages had lifetimes of their own.
    #[error("the stream takes no Nats-TTL; the operator or `millrace provision --apply` lets it")]
    NoLifetimes,
    /// It lets this process in no more.
    #[error("the broker refuses the login: {0}")]
    Refused(String),
}

fn failed(what: &'static str, message: impl ToString) -> BrokerError {
    BrokerError::Request { what, message: message.to_string() }
}

/// What became of a create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    /// It is stored, at this sequence.
    Stored(u64),
    /// The subject does not hold what was expected: somebody else was first.
    Lost,
}

/// The broker, as the protocol of jobs sees it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Broker {
    link: Link,
    ack_retries: Arc<AtomicU64>,
}

impl Broker {
    /// A worker's connection, which stays for as long as the process lives; see [`Link::hold`]. Replies come below
    /// `_INBOX.worker.<namespace>.<model>.<worker>`.
    ///
    /// # Errors
    /// When the configuration is wrong: an address, a login or a certificate.
    pub async fn connect(
        config: &NatsConfig,
        model: &ModelRef,
        name: &SubjectToken,
    ) -> Result<Self, BrokerError> {
        let profile = Profile {
            name: format!("millrace-worker {name}"),
            inbox_prefix: format!("_INBOX.worker.{}.{}.{name}", model.namespace, model.name),
            request_timeout: REQUEST_TIMEOUT,
            commands_max: COMMANDS_MAX,
            messages_max: SUBSCRIPTION_MAX,
        };
        let link = Link::hold(&Access::of(config)?, &profile).await?;
        Ok(Self { link, ack_retries: Arc::default() })
    }

    /// The connection underneath.
    pub fn link(&self) -> &Link {
        &self.link
    }

    /// The client underneath.
    pub fn client(&self) -> &Client {
        self.link.client()
    }

    /// As [`Link::connections`].
    pub fn connections(&self) -> watch::Receiver<u64> {
        self.link.connections()
    }

    /// As [`Link::ready`].
    pub async fn ready(&self) {
        self.link.ready().await;
    }

    /// As [`Link::connected`].
    pub fn connected(&self) -> bool {
        self.link.connected()
    }

    /// Acks that had to be asked for again.
    pub fn ack_retries(&self) -> u64 {
        self.ack_retries.load(Ordering::Relaxed)
    }

    /// The last message on a subject of a stream, `None` if there is none. What the broker itself leaves behind where
    /// a message was (a delete marker) is none.
    ///
    /// # Errors
    /// When it could not be read, which is not the same as absent.
    pub async fn last(&self, stream: &str, subject: &str) -> Result<Option<Message>, BrokerError> {
        Ok(self.last_or_marker(stream, subject).await?.filter(|message| !is_delete_marker(message)))
    }

    /// The sequence of the delete marker that stands where a message was, if one does: a create must name it.
    ///
    /// # Errors
    /// As [`Self::last`].
    pub async fn delete_marker(&self, stream: &str, subject: &str) -> Result<Option<u64>, BrokerError> {
        let found = self.last_or_marker(stream, subject).await?.filter(is_delete_marker);
        Ok(found.as_ref().and_then(sequence_of))
    }

    async fn last_or_marker(&self, stream: &str, subject: &str) -> Result<Option<Message>, BrokerError> {
        const WHAT: &str = "direct get";
        let api = self.link.api(&format!("DIRECT.GET.{stream}.{subject}"));
        let message = self.request(WHAT, &api, None, Bytes::new()).await?;
        // A status that stands in a stored message is its writer's.
        match message.status.filter(|_| sequence_of(&message).is_none()) {
            None => Ok(Some(message)),
            Some(StatusCode::NOT_FOUND) => Ok(None),
            Some(status) => Err(failed(WHAT, describe(status, &message))),
        }
    }

    /// When a stream was created, in Unix milliseconds; asked for anew each time, since a stream may be made anew.
    ///
    /// # Errors
    /// When the broker does not say within [`PATIENCE`], or there is no such stream.
    pub async fn stream_created_ms(&self, stream: &str) -> Result<u64, BrokerError> {
        const WHAT: &str = "stream info";
        let api = self.link.api(&format!("STREAM.INFO.{stream}"));
        let mut patience = Patience::new(PATIENCE);
        loop {
            let answer = self.request(WHAT, &api, None, Bytes::new()).await;
            match answer.and_then(|message| created_ms(WHAT, &message)) {
                Err(error) => patience.rest(error).await?,
                created => return created,
            }
        }
    }

    /// Stores a message if the last one on its subject has this sequence; 0 means that there is none.
    /// Tried again for [`PATIENCE`] while the broker does not answer. A try that was stored and whose answer
    /// was lost makes the next one lose against it, so [`Created::Lost`] means "it is there", not "another
    /// one wrote it".
    ///
    /// # Errors
    /// When it could not be stored, or nobody knows.
    pub async fn create(
        &self,
        subject: &str,
        mut headers: HeaderMap,
        body: Bytes,
        last_sequence: u64,
    ) -> Result<Created, BrokerError> {
        const WHAT: &str = "publish";
        headers.insert(
            async_nats::header::NATS_EXPECTED_LAST_SUBJECT_SEQUENCE,
            last_sequence.to_string().as_str(),
        );
        let mut patience = Patience::new(PATIENCE);
        loop {
            let answer = self.request(WHAT, subject, Some(headers.clone()), body.clone()).await;
            match answer.and_then(|message| puback(&message)) {
                Err(error) => patience.rest(error).await?,
                created => return created,
            }
        }
    }

    /// Acknowledges by request, and believes nothing but an empty success reply.
    ///
    /// # Errors
    /// When there is no such reply: the consumer is gone, or the broker does not answer.
    pub async fn ack(&self, reply: &str) -> Result<(), BrokerError> {
        const WHAT: &str = "ack";
        let mut pause = TRY_PAUSE.0;
        for last_try in (0..ACK_TRIES).map(|n| n + 1 == ACK_TRIES) {
            let answer = self.request(WHAT, reply, None, Bytes::from_static(b"+ACK")).await;
            match answer.and_then(|message| empty_success(WHAT, &message)) {
                Ok(()) => return Ok(()),
                Err(error) if last_try => return Err(error),
                Err(_) => {
                    self.ack_retries.fetch_add(1, Ordering::Relaxed);
                    tokio::time::sleep(pause).await;
                }
            }
            pause *= 2;
        }
        unreachable!("the last try returns")
    }

    /// Hands a delivery back, to come again after the pause.
    ///
    /// # Errors
    /// When the broker did not say that it took it; it comes again after the ack wait then.
    pub async fn nak(&self, reply: &str, after: Duration) -> Result<(), BrokerError> {
        const WHAT: &str = "nak";
        let body = format!("-NAK {{\"delay\":{}}}", after.as_nanos());
        let answer = self.request(WHAT, reply, None, body.into()).await?;
        empty_success(WHAT, &answer)
    }

    async fn request(
        &self,
        what: &'static str,
        subject: &str,
        headers: Option<HeaderMap>,
        body: Bytes,
    ) -> Result<Message, BrokerError> {
        let bytes = body.len();
        let mut request = Request::new().payload(body).timeout(Some(REQUEST_TIMEOUT));
        if let Some(headers) = headers {
            request = request.headers(headers);
        }
        self.client().send_request(subject.to_owned(), request).await.map_err(|error| match error.kind() {
            async_nats::RequestErrorKind::MaxPayloadExceeded => {
                BrokerError::TooLarge { bytes, limit: self.client().max_payload() }
            }
            _ => failed(what, error),
        })
    }
}

/// The pauses between the tries of one request, and their end.
#[derive(Debug)]
pub struct Patience {
    over_at: Instant,
    pause: Duration,
}

impl Patience {
    /// Over after this time.
    pub fn new(limit: Duration) -> Self {
        Self { over_at: Instant::now() + limit, pause: TRY_PAUSE.0 }
    }

    /// Waits before the next try.
    ///
    /// # Errors
    /// The error that came back, when it would come again or the patience is over.
    pub async fn rest(&mut self, error: BrokerError) -> Result<(), BrokerError> {
        if !matches!(error, BrokerError::Request { .. }) || Instant::now() >= self.over_at {
            return Err(error);
        }
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(TRY_PAUSE.1);
        Ok(())
    }
}

fn describe(status: StatusCode, message: &Message) -> String {
    format!("status {status} {}", message.description.as_deref().unwrap_or_default())
}

fn empty_success(what: &'static str, message: &Message) -> Result<(), BrokerError> {
    match message.status {
        None if message.payload.is_empty() => Ok(()),
        None => Err(failed(what, "the reply is not empty")),
        Some(status) => Err(failed(what, describe(status, message))),
    }
}

/// The creation of a stream, in an answer about it.
fn created_ms(what: &'static str, message: &Message) -> Result<u64, BrokerError> {
    let info: Response<Value> =
        serde_json::from_slice(&message.payload).map_err(|error| failed(what, error))?;
    match info {
        Response::Ok(info) => {
            let created = info.get("created").and_then(Value::as_str).unwrap_or_default();
            let created = OffsetDateTime::parse(created, &Rfc3339).map_err(|error| failed(what, error))?;
            u64::try_from(created.unix_timestamp_nanos() / 1_000_000).map_err(|error| failed(what, error))
        }
        Response::Err { error } => Err(failed(what, error)),
    }
}

/// Whether the broker wrote the message itself, in place of one that aged away (`subject_delete_marker_ttl`).
fn is_delete_marker(message: &Message) -> bool {
    message.headers.as_ref().is_some_and(|map| map.get("Nats-Marker-Reason").is_some())
}

/// The stream sequence of a message that was read from a stream.
pub fn sequence_of(message: &Message) -> Option<u64> {
    message.headers.as_ref()?.get("Nats-Sequence")?.as_str().parse().ok()
}

fn puback(message: &Message) -> Result<Created, BrokerError> {
    const WHAT: &str = "publish";
    let response: Response<PublishAck> =
        serde_json::from_slice(&message.payload).map_err(|error| failed(WHAT, error))?;
    match response {
        Response::Ok(ack) => Ok(Created::Stored(ack.sequence)),
        Response::Err { error }
            if [ErrorCode::STREAM_WRONG_LAST_SEQUENCE, WRONG_LAST_SEQUENCE_CONSTANT]
                .contains(&error.error_code()) =>
        {
            Ok(Created::Lost)
        }
        Response::Err { error } if error.error_code() == ErrorCode::MESSAGE_TTL_DISABLED => {
            Err(BrokerError::NoLifetimes)
        }
        Response::Err { error } => Err(failed(WHAT, error)),
    }
}

/// The broker's second code for the same refusal, without numbers in its text; since nats-server 2.11.
const WRONG_LAST_SEQUENCE_CONSTANT: ErrorCode = ErrorCode::STREAM_WRONG_LAST_SEQUENCE_CONSTANT;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn patience_ends() {
        let limit = Duration::from_millis(250);
        let (began, mut patience) = (Instant::now(), Patience::new(limit));
        let silence = failed("publish", "no responders");
        let mut rests = 0;
        while patience.rest(silence.clone()).await.is_ok() {
            rests += 1;
        }
        assert!(began.elapsed() >= limit);
        assert_eq!(rests, 2, "of 100 and 200 ms");
        // What would fail again is not tried again.
        let large = BrokerError::TooLarge { bytes: 2, limit: 1 };
        assert_eq!(Patience::new(limit).rest(large.clone()).await, Err(large));
    }
}
