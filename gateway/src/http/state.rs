//! Small shared state of all gateways in buckets of the broker: read with its revision, written back only where nobody
//! else wrote in between. What it holds may be lost; each user says what follows then.

use std::time::Duration;

use async_nats::jetstream::context::{CreateStreamErrorKind, PublishError, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{Config, DirectGetErrorKind, DiscardPolicy, StorageType};
use async_nats::jetstream::{self, Context, ErrorCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What a bucket is for and how it is made where it is missing.
#[derive(Debug, Clone, Copy)]
pub struct BucketForm {
    /// Its name.
    pub name: &'static str,
    /// What it is for.
    pub description: &'static str,
    /// Most bytes of it.
    pub bytes_max: i64,
    /// What happens to new entries when it is full.
    pub discard: DiscardPolicy,
    /// On disk, or in the memory of the broker.
    pub storage: StorageType,
}

/// A bucket of JSON values, made when it is first written to.
#[derive(Debug, Clone)]
pub struct StateBucket {
    jetstream: Context,
    form: BucketForm,
    replicas: usize,
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateWrite {
    /// It is there, as this revision.
    At(u64),
    /// Somebody else wrote in between.
    Conflict,
}

impl StateBucket {
    /// The bucket; nothing is sent yet.
    pub fn new(jetstream: Context, form: BucketForm, replicas: usize) -> Self {
        Self { jetstream, form, replicas }
    }

    fn stream(&self) -> String {
        format!("KV_{}", self.form.name)
    }

    fn subject(&self, key: &str) -> String {
        format!("$KV.{}.{key}", self.form.name)
    }

    /// An entry's value and revision; the default and 0 where there is none that can be read.
    ///
    /// # Errors
    /// What the broker says, when it is not that there is no entry.
    pub async fn read<T: DeserializeOwned + Default>(&self, key: &str) -> Result<(T, u64), String> {
        let stream = self.jetstream.get_stream_no_info(self.stream()).await.map_err(|e| e.to_string())?;
        match stream.direct_get_last_for_subject(self.subject(key)).await {
            // What another version wrote in another form counts for nothing.
            Ok(found) => Ok((serde_json::from_slice(&found.payload).unwrap_or_default(), found.sequence)),
            Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok((T::default(), 0)),
            Err(error) => match self.jetstream.get_stream(self.stream()).await {
                Ok(_) => Err(error.to_string()),
                Err(_) => {
                    self.create().await?;
                    Ok((T::default(), 0))
                }
            },
        }
    }

    /// Writes an entry that lives for `ttl`, if it is still of this revision.
    ///
    /// # Errors
    /// What the broker says; the entry may have been written all the same.
    pub async fn write<T: Serialize>(
        &self,
        key: &str,
        value: &T,
        revision: u64,
        ttl: Duration,
    ) -> Result<StateWrite, String> {
        let body = serde_json::to_vec(value).expect("our own types are JSON");
        let message = PublishMessage::build()
            .payload(body.into())
            .expected_stream(self.stream())
            .expected_last_subject_sequence(revision)
            .ttl(ttl);
        let sent =
            self.jetstream.send_publish(self.subject(key), message).await.map_err(|e| e.to_string())?;
        match sent.await {
            Ok(ack) => Ok(StateWrite::At(ack.sequence)),
            Err(error) if is_conflict(&error) => Ok(StateWrite::Conflict),
            Err(error) if error.kind() == PublishErrorKind::StreamNotFound => {
                self.create().await?;
                Ok(StateWrite::Conflict)
            }
            Err(error) => Err(error.to_string()),
        }
    }

    async fn create(&self) -> Result<(), String> {
        let config = Config {
            name: self.stream(),
            description: Some(self.form.description.to_owned()),
            subjects: vec![self.subject(">")],
            max_messages_per_subject: 1,
            max_bytes: self.form.bytes_max,
            discard: self.form.discard,
            storage: self.form.storage,
            num_replicas: self.replicas,
            allow_direct: true,
            allow_rollup: true,
            deny_delete: true,
            allow_message_ttl: true,
            ..Config::default()
        };
        match self.jetstream.create_stream(config).await {
            Ok(_) => Ok(()),
            // Another gateway was faster, with settings of its own.
            Err(error) => match error.kind() {
                CreateStreamErrorKind::JetStream(said)
                    if said.error_code() == ErrorCode::STREAM_NAME_EXIST =>
                {
                    Ok(())
                }
                _ => Err(format!("the bucket {} cannot be made: {error}", self.form.name)),
            },
        }
    }
}

/// The broker has two codes for it.
fn is_conflict(error: &PublishError) -> bool {
    let said = std::error::Error::source(error).and_then(|source| source.downcast_ref::<jetstream::Error>());
    error.kind() == PublishErrorKind::WrongLastSequence
        || said.is_some_and(|said| said.error_code() == ErrorCode::STREAM_WRONG_LAST_SEQUENCE_CONSTANT)
}
