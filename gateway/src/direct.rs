//! Batched direct gets: many stored messages for one request, without a consumer.
//!
//! Reading this way keeps no state on the broker, so it goes on after any restart, and a reader needs no
//! right to create consumers. The protocol is the server's (2.11 and up): messages come to an inbox, one
//! with status 204 ends them, 404 says that there are none.

use std::time::Duration;

use async_nats::StatusCode;
use async_nats::jetstream::message::StreamMessage;
use futures::StreamExt;
use millrace_crds::names::ModelRef;
use millrace_queue::broker::sequence_of;
use millrace_queue::link::Link;
use serde_json::{Value, json};

use crate::connect::Connection;
use crate::failure::Failure;

/// Most subjects that one request may name (the server's limit is 1,024).
pub const SUBJECTS_MAX: usize = 256;
/// Most messages that one request reads.
pub const BATCH_MESSAGES_MAX: usize = 512;
/// Most bytes that one request reads: what waits in memory here.
const BATCH_BYTES_MAX: usize = 8 << 20;
/// Longest silence within one answer.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Attempts of one read: with the pauses below they span a broker's restart.
const ATTEMPTS_MAX: u32 = 8;
/// Pause before the second attempt; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub enum Ask<'a> {
    /// The last message of each subject, as far as there is one. At most [`SUBJECTS_MAX`] subjects.
    LastOf(&'a [String]),
    /// Messages of the subjects from this stream sequence on, in order.
    From {
        /// A subject, or a wildcard of subjects.
        subject: &'a str,
        /// The first sequence.
        sequence: u64,
    },
    /// The same, and no more than so many messages, which may be large.
    Few {
        /// A subject, or a wildcard of subjects.
        subject: &'a str,
        /// The first sequence.
        sequence: u64,
        /// Most messages of the answer; at most [`BATCH_MESSAGES_MAX`].
        messages: usize,
    },
}

impl Ask<'_> {
    fn request(&self) -> Value {
        match self {
            Ask::LastOf(subjects) => json!({"multi_last": subjects, "max_bytes": BATCH_BYTES_MAX}),
            Ask::From { subject, sequence } => json!({
                "seq": sequence,
                "next_by_subj": subject,
                "batch": BATCH_MESSAGES_MAX,
                "max_bytes": BATCH_BYTES_MAX,
            }),
            Ask::Few { subject, sequence, messages } => json!({
                "seq": sequence,
                "next_by_subj": subject,
                "batch": messages,
                "max_bytes": BATCH_BYTES_MAX,
            }),
        }
    }
}

/// Why one attempt failed.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    /// Another attempt may succeed.
    #[error("{0}")]
    Passing(String),
    /// Another attempt would fail the same way.
    #[error("{0}")]
    Lasting(String),
}

/// What one request read.
#[derive(Debug)]
pub struct DirectRead {
    /// The messages, in order.
    pub messages: Vec<StreamMessage>,
    /// Whether more of what was asked lies in the stream.
    pub more: bool,
}

/// Reads once, repeating failed attempts.
///
/// # Errors
/// [`Failure::Refused`] when all attempts failed.
pub async fn read(broker: &Connection, stream: &str, ask: Ask<'_>) -> Result<DirectRead, Failure> {
    read_of(&broker.link, stream, ask).await
}

/// The same, of a stream that belongs to no model.
///
/// # Errors
/// As [`read`].
pub async fn read_of(link: &Link, stream: &str, ask: Ask<'_>) -> Result<DirectRead, Failure> {
    let mut pause = PAUSE_MIN;
    for attempt in 1.. {
        match read_once(link, stream, ask).await {
            Ok(batch) => return Ok(batch),
            Err(ReadError::Passing(_)) if attempt < ATTEMPTS_MAX => tokio::time::sleep(pause).await,
            Err(error) => return Err(Failure::Refused(format!("reading stream {stream}: {error}"))),
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
    unreachable!("the loop returns at its last attempt")
}

/// Reads the last message of each subject, as far as there is one, in any number of requests.
///
/// # Errors
/// As [`read`].
pub async fn last_of(
    broker: &Connection,
    stream: &str,
    subjects: &[String],
    mut each: impl FnMut(StreamMessage) -> Result<(), Failure>,
) -> Result<(), Failure> {
    for chunk in subjects.chunks(SUBJECTS_MAX) {
        let mut left = chunk.to_vec();
        loop {
            let batch = read(broker, stream, Ask::LastOf(&left)).await?;
            let read: std::collections::HashSet<String> =
                batch.messages.iter().map(|message| message.subject.to_string()).collect();
            batch.messages.into_iter().try_for_each(&mut each)?;
            // An answer cut off by its size holds at least one message, so this ends.
            left.retain(|subject| !read.contains(subject));
            if !batch.more || read.is_empty() || left.is_empty() {
                break;
            }
        }
    }
    Ok(())
}

async fn read_once(link: &Link, stream: &str, ask: Ask<'_>) -> Result<DirectRead, ReadError> {
    let passing = |error: &dyn std::fmt::Display| ReadError::Passing(error.to_string());
    let inbox = link.client().new_inbox();
    let mut answers = link.client().subscribe(inbox.clone()).await.map_err(|e| passing(&e))?;
    let subject = link.api(&format!("DIRECT.GET.{stream}"));
    let payload = serde_json::to_vec(&ask.request()).expect("a JSON value is JSON");
    let asked = link.client().publish_with_reply(subject, inbox, payload.into()).await;
    asked.map_err(|e| passing(&e))?;
    let mut messages = Vec::new();
    // The bound is the batch's own, and one message that ends it.
    for _ in 0..=BATCH_MESSAGES_MAX.max(SUBJECTS_MAX) {
        let answer = tokio::time::timeout(SILENCE_MAX, answers.next())
            .await
            .map_err(|_| ReadError::Passing(format!("no answer within {} s", SILENCE_MAX.as_secs())))?
            .ok_or_else(|| ReadError::Passing("the connection was closed".to_owned()))?;
        // A status that stands in a stored message is its writer's.
        match answer.status.filter(|_| sequence_of(&answer).is_none()) {
            None => messages.push(answer.try_into().map_err(|e| passing(&e))?),
            // The end of a batch says how many more there are.
            Some(StatusCode::OK) => messages.push(answer.try_into().map_err(|e| passing(&e))?),
            Some(StatusCode::NOT_FOUND) => return Ok(DirectRead { messages, more: false }),
            Some(status) if status.as_u16() == 204 => {
                let left = answer.headers.as_ref().and_then(|h| h.get("Nats-Num-Pending"));
                let more = left.and_then(|text| text.as_str().parse::<u64>().ok()).is_some_and(|n| n > 0);
                return Ok(DirectRead { messages, more });
            }
            Some(status) if matches!(status.as_u16(), 408 | 413) => {
                let said = answer.description.as_deref().unwrap_or("no reason given").to_owned();
                return Err(ReadError::Lasting(format!(
                    "{status}: {said}; nats-server 2.11 or later is needed"
                )));
            }
            Some(status) => return Err(ReadError::Passing(format!("{status}"))),
        }
    }
    Err(ReadError::Lasting("the broker sent more messages than were asked for".to_owned()))
}

/// The last token of a subject of `model`, as a job id, if the subject is one of `model`'s of this `kind`.
pub fn job_of(model: &ModelRef, kind: &str, subject: &str) -> Option<millrace_crds::names::JobId> {
    let prefix = format!("millrace.{kind}.{}.{}.", model.namespace, model.name);
    subject.strip_prefix(&prefix)?.parse().ok()
}
