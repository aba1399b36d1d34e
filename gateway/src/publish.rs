//! Jobs onto the queue: pipelined, each acknowledged, none dropped.
//!
//! A bounded window of publishes is outstanding; each is awaited. A refusal or a silence that may pass is
//! repeated under the same id, so the broker keeps one copy. A full queue narrows the window and waits for
//! room. What would fail again ends the command with the job's name.

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::{self, ErrorCode};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use millrace_crds::job::{JSON, JSONL, header};
use millrace_crds::names::{Class, JobId, ModelRef};

use crate::connect::Connection;
use crate::failure::Failure;
use crate::follow::StallClock;
use crate::output::note;
use crate::plan::PlannedJob;

/// Most publishes outstanding: hides the round trip and the broker's sync to disk, which it batches.
const WINDOW_MAX: usize = 256;
/// Fewest publishes outstanding while the queue is full.
const WINDOW_MIN: usize = 4;
/// Pause after a refusal; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// What all jobs of one publish have in common.
#[derive(Debug, Clone, Default)]
pub struct JobEnvelope {
    /// Class of service.
    pub class: Class,
    /// RFC 3339 time.
    pub deadline: Option<String>,
    /// Whether token deltas are wanted.
    pub stream: bool,
    /// A subject to which a copy of the outcome goes.
    pub reply: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
}

/// A job's body.
#[derive(Debug, Clone)]
pub enum Payload {
    /// In the message.
    Body(Bytes),
    /// At this `s3://` address.
    At(String),
}

impl JobEnvelope {
    /// The message of a job of `model`; `content_type` is that of the payload.
    pub fn message(
        &self,
        model: &ModelRef,
        id: &JobId,
        content_type: &str,
        payload: Payload,
    ) -> PublishMessage {
        let mut headers = HeaderMap::new();
        headers.insert(header::JOB_ID, id.as_str());
        headers.insert(header::CONTENT_TYPE, content_type);
        headers.insert("Nats-Expected-Stream", model.jobs_stream().as_str());
        let optional = [
            (header::DEADLINE, self.deadline.as_deref()),
            (header::STREAM, self.stream.then_some("true")),
            (header::REPLY_SUBJECT, self.reply.as_deref()),
            (header::TRACEPARENT, self.traceparent.as_deref()),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                headers.insert(name, value);
            }
        }
        let body = match payload {
            Payload::Body(body) => body,
            Payload::At(uri) => {
                headers.insert(header::INPUT, uri.as_str());
                Bytes::new()
            }
        };
        PublishMessage::build().headers(headers).payload(body)
    }
}

/// One message to publish.
#[derive(Debug, Clone)]
pub struct Parcel<'a> {
    /// The job.
    pub job: &'a PlannedJob,
    /// Where the body is, if not in the message.
    pub input: Option<String>,
}

impl Parcel<'_> {
    fn message(&self, envelope: &JobEnvelope, model: &ModelRef) -> PublishMessage {
        let payload = match &self.input {
            Some(uri) => Payload::At(uri.clone()),
            None => Payload::Body(self.job.body.clone()),
        };
        envelope.message(model, &self.job.id, if self.job.jsonl { JSONL } else { JSON }, payload)
    }
}

/// What to do after a publish failed.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// The queue is full: wait for room.
    WaitForRoom,
    /// Repeat.
    Repeat,
    /// Give up.
    GiveUp,
}

/// Decides by the kind of a publish's error.
pub fn next(error: &PublishError) -> Next {
    match error.kind() {
        PublishErrorKind::TimedOut
        | PublishErrorKind::BrokenPipe
        | PublishErrorKind::MaxAckPending
        // A restarting broker has no responder for a while; that the stream exists was checked before.
        | PublishErrorKind::StreamNotFound => Next::Repeat,
        PublishErrorKind::Other => {
            match jetstream_error(error).map(|e| (e.code(), e.error_code(), e.to_string())) {
                Some((_, ErrorCode::STREAM_STORE_FAILED, text)) if text.contains("maximum") => {
                    Next::WaitForRoom
                }
                Some((503, _, _)) => Next::Repeat,
                _ => Next::GiveUp,
            }
        }
        _ => Next::GiveUp,
    }
}

fn jetstream_error(error: &PublishError) -> Option<&jetstream::Error> {
    std::error::Error::source(error)?.downcast_ref()
}

/// Publishes all parcels, and returns when all are acknowledged.
///
/// `each` hears every acknowledgement, with the parcel's place. `duplicate` in it means: accepted before.
///
/// # Errors
/// [`Failure::Stalled`] when `timeout` passes without an acknowledgement, [`Failure::Refused`] when the
/// broker refuses a job for good. Jobs acknowledged before stay published; repeating the command is safe.
pub async fn publish_all(
    broker: &Connection,
    envelope: &JobEnvelope,
    parcels: &[Parcel<'_>],
    timeout: Duration,
    mut each: impl FnMut(usize, &PublishAck),
) -> Result<(), Failure> {
    let subject = broker.model.jobs_subject(envelope.class);
    let mut waiting: VecDeque<usize> = (0..parcels.len()).collect();
    let mut outstanding = FuturesUnordered::new();
    let mut pace = Pace::default();
    let mut patience = StallClock::new(timeout);
    while !waiting.is_empty() || !outstanding.is_empty() {
        while outstanding.len() < pace.room()
            && let Some(place) = waiting.pop_front()
        {
            let message = parcels[place].message(envelope, &broker.model);
            let publish = publish_one(broker, subject.clone(), message);
            outstanding.push(async move { (place, publish.await) });
        }
        match outstanding.next().await {
            Some((place, Ok(ack))) => {
                each(place, &ack);
                patience.renew();
                pace.accepted();
            }
            Some((place, Err(error))) => {
                waiting.push_front(place);
                let said = jetstream_error(&error).map_or(error.to_string(), ToString::to_string);
                if patience.is_over() {
                    let left = waiting.len() + outstanding.len();
                    return Err(Failure::Stalled(format!(
                        "no job was accepted for --timeout {}: {said}; {left} of {} jobs are not published; \
                         the same command publishes the rest",
                        patience.limit(),
                        parcels.len()
                    )));
                }
                pace.refused(next(&error), parcels[place].job, &said)?;
            }
            None => {}
        }
        if outstanding.is_empty() && pace.backing_off {
            // Refused publishes may return in any order; the input's order is kept where it can be.
            waiting.make_contiguous().sort_unstable();
            pace.rest().await;
        }
    }
    Ok(())
}

/// How many publishes may be outstanding: all of the window, or none more after a refusal until the
/// outstanding ones are through and a pause is over.
#[derive(Debug)]
struct Pace {
    window: usize,
    pause: Duration,
    backing_off: bool,
    told: bool,
}

impl Default for Pace {
    fn default() -> Self {
        Self { window: WINDOW_MAX, pause: PAUSE_MIN, backing_off: false, told: false }
    }
}

impl Pace {
    fn room(&self) -> usize {
        if self.backing_off { 0 } else { self.window }
    }

    fn accepted(&mut self) {
        self.window = (self.window + 1).min(WINDOW_MAX);
        self.pause = PAUSE_MIN;
    }

    fn refused(&mut self, next: Next, job: &PlannedJob, said: &str) -> Result<(), Failure> {
        self.window = match next {
            Next::GiveUp => {
                return Err(Failure::Refused(format!("{}: job {} was refused: {said}", job.origin, job.id)));
            }
            Next::WaitForRoom => WINDOW_MIN,
            Next::Repeat => (self.window / 2).max(WINDOW_MIN),
        };
        self.backing_off = true;
        if !std::mem::replace(&mut self.told, true) {
            note(&format!("the broker takes no more jobs at the moment ({said}); waiting"));
        }
        Ok(())
    }

    async fn rest(&mut self) {
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        self.backing_off = false;
    }
}

/// Publishes one message and awaits its acknowledgement.
///
/// # Errors
/// As the client library tells them; [`next`] says what follows.
pub async fn publish_one(
    broker: &Connection,
    subject: String,
    message: PublishMessage,
) -> Result<PublishAck, PublishError> {
    broker.jetstream.send_publish(subject, message).await?.await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: u64, description: &str) -> PublishError {
        let json = serde_json::json!({"code": 503, "err_code": code, "description": description});
        let error: jetstream::Error = serde_json::from_value(json).unwrap();
        PublishError::with_source(PublishErrorKind::Other, error)
    }

    #[test]
    fn what_happens_after_each_error() {
        let table = [
            (refused(10077, "maximum messages exceeded"), Next::WaitForRoom),
            (refused(10077, "maximum bytes exceeded"), Next::WaitForRoom),
            (refused(10008, "JetStream system temporarily unavailable"), Next::Repeat),
            (PublishError::new(PublishErrorKind::TimedOut), Next::Repeat),
            (PublishError::new(PublishErrorKind::StreamNotFound), Next::Repeat),
            (PublishError::new(PublishErrorKind::BrokenPipe), Next::Repeat),
            (PublishError::new(PublishErrorKind::MaxPayloadExceeded), Next::GiveUp),
            (PublishError::new(PublishErrorKind::WrongLastSequence), Next::GiveUp),
        ];
        for (error, expected) in table {
            assert_eq!(next(&error), expected, "{error}");
        }
    }
}
