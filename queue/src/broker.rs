//! The broker: the connection, and the four things that the protocol asks of it.
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
use async_nats::{Client, ConnectOptions, Event, HeaderMap, Message, Request, ServerAddr, StatusCode};
use bytes::Bytes;
use millrace_crds::config::NatsConfig;
use millrace_crds::names::SubjectToken;
use percent_encoding::percent_decode_str;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;

/// How long one request to the broker may take.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a look-up or a create is tried while the broker does not answer it. Longer than a broker takes
/// to restart or to elect a leader, and short beside the time that a job's answer may have cost.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How often an ack is tried. An unconfirmed one costs only a redelivery that finds the outcome.
const ACK_TRIES: u32 = 4;
/// Pause before the second try, and the end of its doubling.
const TRY_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// Pause between attempts to connect, and its growth's end.
const CONNECT_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
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

/// The connection. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Broker {
    client: Client,
    connections: watch::Receiver<u64>,
    ack_retries: Arc<AtomicU64>,
}

impl Broker {
    /// Connects, and stays connected: waits for a broker that is not there yet, and comes back to one that
    /// went away, for as long as the process lives.
    ///
    /// # Errors
    /// When the configuration is wrong: an address, the credentials or the CA file.
    pub async fn connect(config: &NatsConfig, name: &SubjectToken) -> Result<Self, BrokerError> {
        let wrong = |field, message: String| BrokerError::Config { field, message };
        if config.servers.is_empty() {
            return Err(wrong("servers", "no address; at least 1 is needed".into()));
        }
        let addresses = config
            .servers
            .iter()
            .map(|server| {
                server
                    .parse::<ServerAddr>()
                    .map_err(|error| wrong("servers", format!("{server:?} is not an address: {error}")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let (sender, connections) = watch::channel(0);
        let sender = Arc::new(sender);
        let mut options = ConnectOptions::new()
            .name(format!("millrace-worker {name}"))
            .custom_inbox_prefix(format!("_INBOX.{name}"))
            .max_reconnects(None)
            .retry_on_initial_connect()
            .request_timeout(Some(REQUEST_TIMEOUT))
            .client_capacity(COMMANDS_MAX)
            .subscription_capacity(SUBSCRIPTION_MAX)
            .reconnect_delay_callback(|tries| {
                CONNECT_PAUSE.0.saturating_mul(1 << tries.min(10)).min(CONNECT_PAUSE.1)
            })
            .event_callback(move |event| {
                let sender = sender.clone();
                async move { on_event(&event, &sender) }
            });
        options = with_login(options, &addresses);
        if let Some(path) = &config.credentials_file {
            options = options
                .credentials_file(path)
                .await
                .map_err(|error| wrong("credentialsFile", format!("{}: {error}", path.display())))?;
        }
        if let Some(path) = &config.ca_file {
            options = options.add_root_certificates(path.clone()).require_tls(true);
        }
        let client = options.connect(addresses).await.map_err(|error| wrong("servers", error.to_string()))?;
        Ok(Self { client, connections, ack_retries: Arc::default() })
    }

    /// The client underneath.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Counts the connections made: a change says that what was in flight may be gone.
    pub fn connections(&self) -> watch::Receiver<u64> {
        self.connections.clone()
    }

    /// Waits until the broker answers.
    pub async fn ready(&self) {
        let mut connections = self.connections();
        let connected = async {
            // The sender lives in the client's options, so an error means that the process ends.
            let _ = connections.wait_for(|&count| count > 0).await;
        };
        connected.await;
    }

    /// Whether the connection stands now.
    pub fn connected(&self) -> bool {
        self.client.connection_state() == async_nats::connection::State::Connected
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
        let api = format!("$JS.API.DIRECT.GET.{stream}.{subject}");
        let message = self.request(WHAT, &api, None, Bytes::new()).await?;
        match message.status {
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
        let api = format!("$JS.API.STREAM.INFO.{stream}");
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
        self.client.send_request(subject.to_owned(), request).await.map_err(|error| match error.kind() {
            async_nats::RequestErrorKind::MaxPayloadExceeded => {
                BrokerError::TooLarge { bytes, limit: self.client.max_payload() }
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

/// Logs in as the first address with a user says: by user and password, or by a token. The client library parses these
/// and does not use them.
pub fn with_login(options: ConnectOptions, addresses: &[ServerAddr]) -> ConnectOptions {
    match addresses.iter().find_map(login) {
        Some((user, Some(password))) => options.user_and_password(user, password),
        Some((token, None)) => options.token(token),
        None => options,
    }
}

fn login(address: &ServerAddr) -> Option<(String, Option<String>)> {
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    Some((decoded(address.username()?), address.password().map(decoded)))
}

fn on_event(event: &Event, connections: &watch::Sender<u64>) {
    match event {
        Event::Connected => {
            connections.send_modify(|count| *count += 1);
            tracing::info!("broker connected");
        }
        Event::Disconnected => tracing::warn!("broker disconnected"),
        // The server's words may quote a subject, never a body.
        other => tracing::warn!(event = %other, "broker event"),
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

    #[test]
    fn logins_of_addresses() {
        let of = |text: &str| login(&text.parse().unwrap());
        let own = |user: &str, password: Option<&str>| Some((user.to_owned(), password.map(str::to_owned)));
        assert_eq!(of("nats://host:4222"), None);
        assert_eq!(of("nats://me:a%40b%2F@host"), own("me", Some("a@b/")));
        assert_eq!(of("tls://token@host:4222"), own("token", None));
    }

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
