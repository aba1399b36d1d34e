//! What gateways share: records in buckets of the broker, each written only where nobody else wrote since it was read.
//!
//! A bucket is a key-value bucket of JetStream, made when it is first written. A key is `<tenant>.<id>`, where the
//! tenant stands as a part of its hash, so that the records of others cannot be named. Ids begin with their time:
//! their order is that in which they were made, and a page goes on after an id whether or not that is still there.

use std::marker::PhantomData;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use async_nats::jetstream::context::{GetStreamErrorKind, PublishErrorKind};
use async_nats::jetstream::kv;
use async_nats::jetstream::message::{PublishMessage, StreamMessage};
use async_nats::jetstream::stream::{DirectGetErrorKind, StorageType};
use async_nats::jetstream::{Context, ErrorCode};
use bytes::Bytes;
use hex::ToHex;
use millrace_queue::link::Link;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;

use crate::direct::{self, Ask};
use crate::http::error::{ApiCode, ApiError};
use crate::publish::{self, Next};

/// How long a write is tried while the broker does not answer.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);
/// Pause between two tries.
const WRITE_PAUSE: Duration = Duration::from_millis(100);
/// Hex digits of a tenant in a key: 64 bits.
const TENANT_DIGITS: usize = 16;
/// Random bytes of an id, behind its time: nobody guesses one.
const ID_BYTES: usize = 10;
/// Most records that one listing reads.
const LISTED_MAX: usize = 100_000;

/// Why a record was not read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Somebody else wrote it since it was read.
    #[error("somebody else wrote the record")]
    Conflict,
    /// The broker did not do it.
    #[error("{0}")]
    Away(String),
}

impl From<RecordError> for ApiError {
    fn from(error: RecordError) -> Self {
        tracing::warn!(%error, "a record");
        ApiError::new(ApiCode::BrokerUnavailable, "the broker does not answer")
    }
}

fn away(error: impl std::fmt::Display) -> RecordError {
    RecordError::Away(error.to_string())
}

/// A record as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revised<T> {
    /// The record.
    pub value: T,
    /// Which one of its versions.
    pub revision: u64,
}

/// The records of one bucket.
#[derive(Debug)]
pub struct Records<T> {
    link: Link,
    jetstream: Context,
    bucket: &'static str,
    replicas: usize,
    made: OnceCell<()>,
    of: PhantomData<fn() -> T>,
}

/// How a tenant stands in the keys of its records.
pub fn tenant_key(tenant: &str) -> String {
    let digits: String = Sha256::digest(tenant).encode_hex();
    digits[..TENANT_DIGITS].to_owned()
}

/// A new id: the prefix, 12 hex digits of the time, and 80 random bits.
pub fn new_id(prefix: &str) -> String {
    let millis = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64;
    let mut bytes = [0; ID_BYTES];
    getrandom::fill(&mut bytes).expect("Linux has random bytes once it is up");
    let random: String = bytes.encode_hex();
    format!("{prefix}{:012x}{random}", millis & 0xffff_ffff_ffff)
}

/// Whether a text has the form of an id with this prefix; what has not must never reach a subject.
pub fn is_id(prefix: &str, text: &str) -> bool {
    let digits = text.strip_prefix(prefix).unwrap_or_default();
    digits.len() == 12 + 2 * ID_BYTES
        && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

impl<T: Serialize + DeserializeOwned> Records<T> {
    /// Those of a bucket, which is made when it is first needed.
    pub fn new(link: Link, jetstream: Context, bucket: &'static str, replicas: usize) -> Self {
        Self { link, jetstream, bucket, replicas, made: OnceCell::new(), of: PhantomData }
    }

    fn stream(&self) -> String {
        format!("KV_{}", self.bucket)
    }

    fn subject(&self, key: &str) -> String {
        format!("$KV.{}.{key}", self.bucket)
    }

    /// Whether the bucket is there. What is only read is not made.
    async fn is_there(&self) -> Result<bool, RecordError> {
        if self.made.initialized() {
            return Ok(true);
        }
        match self.jetstream.get_stream(self.stream()).await.map_err(|error| error.kind()) {
            Ok(_) => {
                let _ = self.made.set(());
                Ok(true)
            }
            Err(GetStreamErrorKind::JetStream(said)) if said.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                Ok(false)
            }
            Err(kind) => Err(away(format!("bucket {}: {kind}", self.bucket))),
        }
    }

    async fn ensure(&self) -> Result<(), RecordError> {
        if self.is_there().await? {
            return Ok(());
        }
        let making = async {
            let config = kv::Config {
                bucket: self.bucket.to_owned(),
                storage: StorageType::File,
                num_replicas: self.replicas,
                ..kv::Config::default()
            };
            self.jetstream.create_key_value(config).await.map(|_| ()).map_err(away)
        };
        self.made.get_or_try_init(|| making).await.map(|_| ())
    }

    fn read(&self, message: &StreamMessage) -> Result<Revised<T>, RecordError> {
        let value = serde_json::from_slice(&message.payload)
            .map_err(|error| away(format!("{}: the record cannot be read: {error}", message.subject)))?;
        Ok(Revised { value, revision: message.sequence })
    }

    async fn last(&self, key: &str) -> Result<Option<StreamMessage>, RecordError> {
        if !self.is_there().await? {
            return Ok(None);
        }
        let stream = self.jetstream.get_stream_no_info(self.stream()).await.map_err(away)?;
        match stream.direct_get_last_for_subject(self.subject(key)).await {
            // The mark of a deletion by another tool is no record.
            Ok(message) if message.payload.is_empty() => Ok(None),
            Ok(message) => Ok(Some(message)),
            Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(None),
            Err(error) => Err(away(error)),
        }
    }

    /// A record, if there is one.
    ///
    /// # Errors
    /// [`RecordError::Away`].
    pub async fn get(&self, key: &str) -> Result<Option<Revised<T>>, RecordError> {
        self.last(key).await?.map(|message| self.read(&message)).transpose()
    }

    /// Makes a record where there is none, and gives its revision.
    ///
    /// # Errors
    /// [`RecordError::Conflict`] where there is one, [`RecordError::Away`].
    pub async fn create(&self, key: &str, value: &T) -> Result<u64, RecordError> {
        self.update(key, value, 0).await
    }

    /// Writes a record that is still as it was read, and gives its new revision.
    ///
    /// # Errors
    /// [`RecordError::Conflict`] where it is not, [`RecordError::Away`].
    pub async fn update(&self, key: &str, value: &T, revision: u64) -> Result<u64, RecordError> {
        self.ensure().await?;
        let body = Bytes::from(serde_json::to_vec(value).expect("our own types are JSON"));
        let over_at = Instant::now() + WRITE_PATIENCE;
        loop {
            let message = PublishMessage::build()
                .payload(body.clone())
                .expected_last_subject_sequence(revision)
                .expected_stream(self.stream());
            let sent = async { self.jetstream.send_publish(self.subject(key), message).await?.await };
            let error = match sent.await {
                Ok(ack) => return Ok(ack.sequence),
                Err(error) => error,
            };
            if error.kind() == PublishErrorKind::WrongLastSequence {
                // It may be our own write, whose acknowledgement was lost.
                let own = self.last(key).await?.filter(|m| m.payload == body && m.sequence > revision);
                return own.map(|message| message.sequence).ok_or(RecordError::Conflict);
            }
            if publish::next(&error) == Next::GiveUp || Instant::now() >= over_at {
                return Err(away(error));
            }
            tokio::time::sleep(WRITE_PAUSE).await;
        }
    }

    /// Removes a record for good; one that is not there is removed already.
    ///
    /// # Errors
    /// [`RecordError::Away`].
    pub async fn remove(&self, key: &str) -> Result<(), RecordError> {
        if !self.is_there().await? {
            return Ok(());
        }
        let stream = self.jetstream.get_stream_no_info(self.stream()).await.map_err(away)?;
        stream.purge().filter(self.subject(key)).await.map(|_| ()).map_err(away)
    }

    /// Hands over all records whose key begins with a prefix of whole tokens, or all, with their keys; in no order.
    ///
    /// # Errors
    /// [`RecordError::Away`].
    pub async fn each(
        &self,
        prefix: Option<&str>,
        mut each: impl FnMut(&str, Revised<T>),
    ) -> Result<(), RecordError> {
        if !self.is_there().await? {
            return Ok(());
        }
        let subject = self.subject(&prefix.map_or(">".to_owned(), |prefix| format!("{prefix}.>")));
        let (skipped, mut sequence, mut seen) = (self.subject("").len(), 1, 0);
        loop {
            let ask = Ask::From { subject: &subject, sequence };
            let batch = direct::read_of(&self.link, &self.stream(), ask).await.map_err(away)?;
            let Some(last) = batch.messages.last() else { return Ok(()) };
            sequence = last.sequence + 1;
            seen += batch.messages.len();
            for message in batch.messages.iter().filter(|message| !message.payload.is_empty()) {
                match self.read(message) {
                    Ok(record) => each(&message.subject[skipped..], record),
                    Err(error) => tracing::error!(%error, "a record is passed over"),
                }
            }
            if seen >= LISTED_MAX {
                return Err(away(format!("bucket {} has more than {LISTED_MAX} records", self.bucket)));
            }
        }
    }
}

/// Seconds since 1970.
pub fn now() -> i64 {
    time::OffsetDateTime::now_utc().unix_timestamp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_in_the_order_of_their_time() {
        let mut ids = Vec::new();
        for _ in 0..3 {
            ids.push(new_id("file-"));
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut sorted = ids.clone();
        sorted.sort();
        assert_eq!(ids, sorted);
        assert!(ids.iter().all(|id| is_id("file-", id)), "{ids:?}");
        for wrong in ["", "file-", "file-*", &ids[0][1..], &format!("{}.x", ids[0]), &ids[0].to_uppercase()] {
            assert!(!is_id("file-", wrong), "{wrong}");
        }
    }
}
