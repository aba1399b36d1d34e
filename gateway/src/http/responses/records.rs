//! What is kept of a response beside its job: what was asked, for as long as somebody may ask for it.
//!
//! A job's body leaves the queue with its outcome, so the request is kept in a stream of its own, one message for each
//! response, made when it is first needed. It is bounded in time and size; the oldest go first.

use std::time::Duration;

use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::stream::{
    Config, DirectGetErrorKind, DiscardPolicy, RetentionPolicy, StorageType,
};
use async_nats::jetstream::{Context, ErrorCode};
use bytes::Bytes;
use millrace_crds::names::{JobId, ModelRef};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::OnceCell;

use crate::http::error::{ApiCode, ApiError};

/// The stream.
const STREAM: &str = "MILLRACE_RESPONSES";
/// How long a record is kept: as long as a job may wait.
const AGE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Most bytes of all records.
const BYTES_MAX: i64 = 1 << 30;
/// How long the broker may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was asked.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ResponseRecord {
    /// When, in Unix seconds.
    pub created: i64,
    /// What the client called the model.
    pub model: String,
    /// Whether nobody waited for it.
    pub background: bool,
    /// Whether it is kept.
    pub store: bool,
    /// Fields that stand in the response as they came.
    pub echo: Map<String, Value>,
    /// The conversation without instructions, in the form of chats, its own input at the end.
    pub conversation: Vec<Value>,
    /// How many messages of it are the response's own input.
    pub own: usize,
}

/// The records of all responses.
#[derive(Debug)]
pub struct ResponseRecords {
    jetstream: Context,
    replicas: usize,
    made: OnceCell<()>,
}

fn subject(model: &ModelRef, job: &JobId) -> String {
    format!("millrace.responses.{}.{}.{job}", model.namespace, model.name)
}

fn away(reason: impl std::fmt::Display) -> ApiError {
    tracing::warn!(%reason, "the records of responses");
    ApiError::new(ApiCode::BrokerUnavailable, "the broker does not keep responses at the moment")
}

/// What the broker says, or that it does not.
async fn soon<T>(asking: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
    tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| Err(away("no answer in time")))
}

impl ResponseRecords {
    /// Those of a broker.
    pub fn new(jetstream: Context, replicas: usize) -> Self {
        Self { jetstream, replicas, made: OnceCell::new() }
    }

    async fn make(&self) -> Result<(), ApiError> {
        let making = async {
            match self.jetstream.get_stream(STREAM).await.map_err(|error| error.kind()) {
                Ok(_) => return Ok(()),
                Err(GetStreamErrorKind::JetStream(said))
                    if said.error_code() == ErrorCode::STREAM_NOT_FOUND => {}
                Err(kind) => return Err(away(kind)),
            }
            let config = Config {
                name: STREAM.to_owned(),
                subjects: vec!["millrace.responses.*.*.*".to_owned()],
                retention: RetentionPolicy::Limits,
                discard: DiscardPolicy::Old,
                storage: StorageType::File,
                max_age: AGE_MAX,
                max_bytes: BYTES_MAX,
                max_messages_per_subject: 1,
                num_replicas: self.replicas,
                allow_direct: true,
                ..Config::default()
            };
            self.jetstream.get_or_create_stream(config).await.map(|_| ()).map_err(away)
        };
        self.made.get_or_try_init(|| making).await.map(|_| ())
    }

    /// Keeps a record.
    ///
    /// # Errors
    /// [`ApiCode::BrokerUnavailable`], [`ApiCode::RequestTooLarge`].
    pub async fn put(
        &self,
        (model, job): (&ModelRef, &JobId),
        record: &ResponseRecord,
        limit: usize,
    ) -> Result<(), ApiError> {
        let body = Bytes::from(serde_json::to_vec(record).expect("our own types are JSON"));
        if body.len() > limit {
            let message =
                format!("the conversation has {} bytes; {limit} are kept: give store: false", body.len());
            return Err(ApiError::new(ApiCode::RequestTooLarge, message));
        }
        soon(async {
            self.make().await?;
            let sent = self.jetstream.publish(subject(model, job), body).await.map_err(away)?;
            sent.await.map(|_| ()).map_err(away)
        })
        .await
    }

    /// A record, if there is one.
    ///
    /// # Errors
    /// [`ApiCode::BrokerUnavailable`].
    pub async fn get(&self, model: &ModelRef, job: &JobId) -> Result<Option<ResponseRecord>, ApiError> {
        soon(async {
            self.make().await?;
            let stream = self.jetstream.get_stream_no_info(STREAM).await.map_err(away)?;
            match stream.direct_get_last_for_subject(subject(model, job)).await {
                Ok(message) => serde_json::from_slice(&message.payload).map(Some).map_err(away),
                Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(None),
                Err(error) => Err(away(error)),
            }
        })
        .await
    }

    /// Removes a record for good.
    ///
    /// # Errors
    /// [`ApiCode::BrokerUnavailable`].
    pub async fn remove(&self, model: &ModelRef, job: &JobId) -> Result<(), ApiError> {
        soon(async {
            let stream = self.jetstream.get_stream_no_info(STREAM).await.map_err(away)?;
            stream.purge().filter(subject(model, job)).await.map(|_| ()).map_err(away)
        })
        .await
    }
}
