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
use async_nats::jetstream::stream::DirectGetErrorKind;
use async_nats::jetstream::{self, ErrorCode};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use millrace_crds::job::{JSON, JSONL, header};
use millrace_crds::names::{Class, JobId, ModelRef};
use millrace_queue::identity::body_digest;

use crate::connect::Connection;
use crate::failure::Failure;
use crate::follow::{self, StallClock};
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

impl Payload {
    /// What tells two bodies of one job id apart.
    pub fn digest(&self) -> String {
        match self {
            Payload::Body(body) => body_digest(body, None),
            Payload::At(uri) => body_digest(b"", Some(uri)),
        }
    }
}

impl JobEnvelope {
    /// The message of a job of `model`, which a header names; `content_type` is that of the payload.
    pub fn message(
        &self,
        model: &ModelRef,
        (id_header, id): (&str, &JobId),
        content_type: &str,
        payload: Payload,
    ) -> PublishMessage {
        let mut headers = HeaderMap::new();
        headers.insert(id_header, id.as_str());
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
    fn payload(&self) -> Payload {
        match &self.input {
            Some(uri) => Payload::At(uri.clone()),
            None => Payload::Body(self.job.body.clone()),
        }
    }

    /// The message; `id_header` names the job.
    fn message(&self, envelope: &JobEnvelope, model: &ModelRef, id_header: &str) -> PublishMessage {
        let content_type = if self.job.jsonl { JSONL } else { JSON };
        envelope.message(model, (id_header, &self.job.id), content_type, self.payload())
    }
}

/// What is left of a job whose id the broker knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobStanding {
    /// It lies in the queue, or has its outcome.
    There,
    /// One with another body does.
    OtherBody,
    /// Nothing.
    Gone,
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
/// `each` hears every acknowledgement, with the parcel's place. `duplicate` in it means: accepted before, and still in
/// the queue or with an outcome.
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
            let publish = publish_parcel(broker, &subject, &parcels[place], envelope);
            outstanding.push(async move { (place, publish.await) });
        }
        match outstanding.next().await {
            Some((place, Ok(None))) => {
                let job = parcels[place].job;
                return Err(Failure::Refused(format!(
                    "{}: job id {} is that of a job with another body, in the queue or with an outcome; give \
                     another --id-prefix, or leave --id-from custom-id out",
                    job.origin, job.id
                )));
            }
            Some((place, Ok(Some(ack)))) => {
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

/// Publishes a job's message and awaits its acknowledgement; `None` if the id is that of another job.
///
/// That the broker knows the id is no promise that the job is there: its queue may have been purged, or its outcome
/// aged away. Then the job is published again, named in a way that the broker does not compare.
async fn publish_parcel(
    broker: &Connection,
    subject: &str,
    parcel: &Parcel<'_>,
    envelope: &JobEnvelope,
) -> Result<Option<PublishAck>, PublishError> {
    let send = async |id_header: &str| {
        publish_one(broker, subject.to_owned(), parcel.message(envelope, &broker.model, id_header)).await
    };
    let ack = send(header::JOB_ID).await?;
    if !ack.duplicate {
        return Ok(Some(ack));
    }
    let digest = parcel.payload().digest();
    match standing(broker, (&parcel.job.id, digest.as_str()), ack.sequence).await? {
        JobStanding::There => Ok(Some(ack)),
        JobStanding::OtherBody => Ok(None),
        JobStanding::Gone => Ok(Some(send(header::RESULT_JOB_ID).await?)),
    }
}

/// Looks for the job of which the broker says that it stored it at `sequence`: first in the queue and then among the
/// outcomes, since that is the way it goes. `digest` is that of its body.
///
/// # Errors
/// [`PublishErrorKind::TimedOut`] when the broker cannot be asked.
pub async fn standing(
    broker: &Connection,
    (id, digest): (&JobId, &str),
    sequence: u64,
) -> Result<JobStanding, PublishError> {
    let unread = |error: &dyn std::fmt::Display| {
        PublishError::with_source(PublishErrorKind::TimedOut, error.to_string())
    };
    let same = |same| if same { JobStanding::There } else { JobStanding::OtherBody };
    let jobs = broker.jetstream.get_stream_no_info(broker.model.jobs_stream()).await;
    match jobs.map_err(|error| unread(&error))?.direct_get(sequence).await {
        Ok(found) => {
            let text = |name: &str| found.headers.get(name).map(|value| value.as_str());
            if text(header::JOB_ID) == Some(id.as_str()) {
                return Ok(same(body_digest(&found.payload, text(header::INPUT)) == digest));
            }
        }
        Err(error) if error.kind() == DirectGetErrorKind::NotFound => {}
        Err(error) => return Err(unread(&error)),
    }
    let outcomes = follow::stored(broker, std::slice::from_ref(id)).await;
    let outcomes = outcomes.map_err(|failure| unread(&failure))?;
    Ok(outcomes.first().map_or(JobStanding::Gone, |outcome| same(outcome.of.is_of_body(digest))))
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
    fn a_payload_is_told_by_its_body_or_its_address() {
        let body = |text: &'static str| Payload::Body(Bytes::from_static(text.as_bytes())).digest();
        assert_eq!(body("a"), body_digest(b"a", None));
        assert_ne!(body("a"), body("b"));
        assert_eq!(Payload::At("s3://b/a".into()).digest(), body_digest(b"", Some("s3://b/a")));
        assert_ne!(Payload::At("s3://b/a".into()).digest(), body("s3://b/a"));
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
