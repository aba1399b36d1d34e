//! Outcomes: read before a job runs, created where there is none, and for a dead one the copy of the job.
//!
//! An outcome never changes. Creating one is a compare-and-set against "no message on this subject", so of
//! many writers one wins, and losing is as good: there is an outcome. A dead outcome comes first and its
//! copy second; a crash between them is repaired by whoever sees the job next, before it is acknowledged.

use std::time::Duration;

use async_nats::{HeaderMap, Message};
use bytes::Bytes;
use millrace_crds::attempts::AttemptRecord;
use millrace_crds::job::{JobHeaders, header};
use millrace_crds::names::{JobId, ModelRef, SubjectToken};
use millrace_crds::result::{ErrorCode, LineError, OutcomeKind, OutputLine};

use crate::broker::{Broker, BrokerError, Created, PATIENCE, Patience, sequence_of};
use crate::delivery::Delivery;
use crate::identity::AnswerOf;

/// Longest message of an error that is stored or logged, in characters.
const MESSAGE_CHARS_MAX: usize = 2000;

/// How a job ended, before it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// How.
    pub kind: OutcomeKind,
    /// The bytes of the record: one output line, or one a line.
    pub body: Bytes,
    /// Why, unless it completed.
    pub error: Option<LineError>,
    /// Unknown fields of its requests that were ignored.
    pub ignored_fields: Vec<String>,
}

impl Outcome {
    /// The job has its answer; unknown fields of its requests were ignored.
    pub fn completed(body: Bytes, ignored_fields: Vec<String>) -> Self {
        Self { kind: OutcomeKind::Completed, body, error: None, ignored_fields }
    }

    /// The job has none. `kind` is not `completed`.
    pub fn failed(kind: OutcomeKind, job: &JobId, code: ErrorCode, message: &str) -> Self {
        let message: String = message.chars().take(MESSAGE_CHARS_MAX).collect();
        let error = LineError { code, message };
        let line = OutputLine {
            id: job.to_string(),
            custom_id: job.to_string(),
            response: None,
            error: Some(error.clone()),
        };
        let body = serde_json::to_vec(&line).expect("strings serialise").into();
        Self { kind, body, error: Some(error), ignored_fields: Vec::new() }
    }
}

/// What the broker knows about a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Known {
    /// The stored outcome.
    pub outcome: Option<StoredOutcome>,
    /// Whether somebody cancelled it.
    pub cancelled: bool,
    /// The ledger of its attempts, and the sequence of that record.
    pub ledger: Option<(AttemptRecord, u64)>,
}

/// A stored outcome, as far as finishing the job needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredOutcome {
    /// How the job ended.
    pub kind: OutcomeKind,
    /// The attempt that wrote it.
    pub attempt: u32,
    /// Why, if it is dead.
    pub reason: String,
    /// Whose answer it is.
    pub of: AnswerOf,
}

/// What is written beside an outcome's body.
#[derive(Debug, Clone, Copy)]
pub struct OutcomeEnvelope<'a> {
    /// The job.
    pub headers: &'a JobHeaders,
    /// The digest of its body.
    pub body_digest: &'a str,
    /// Which attempt writes, from 1.
    pub attempt: u32,
    /// From the job's stream timestamp until its start, in milliseconds.
    pub queue_wait_ms: f64,
    /// How long the attempt ran, in milliseconds.
    pub run_ms: f64,
}

/// A message that is to be created, or to replace one.
struct Record {
    stream: String,
    subject: String,
    headers: HeaderMap,
    body: Bytes,
    lifetime: Option<Duration>,
}

/// Where outcomes are kept.
#[derive(Debug, Clone)]
pub struct Results {
    broker: Broker,
    model: ModelRef,
    worker: SubjectToken,
    digest: String,
    ttl: Duration,
}

impl Results {
    /// `digest` is that of the model's files; every record carries it. Outcomes live for `ttl`.
    pub fn new(broker: Broker, model: ModelRef, worker: SubjectToken, digest: String, ttl: Duration) -> Self {
        Self { broker, model, worker, digest, ttl }
    }

    /// Who writes.
    pub fn worker(&self) -> &SubjectToken {
        &self.worker
    }

    /// Reads the outcome, cancel marker and ledger of a job; tried again while the broker does not answer.
    ///
    /// # Errors
    /// When one of them could not be read. That is not "absent": the job must wait.
    pub async fn look_up(&self, job: &JobId) -> Result<Known, BrokerError> {
        let mut patience = Patience::new(PATIENCE);
        loop {
            match self.look_up_once(job).await {
                Err(error) => patience.rest(error).await?,
                known => return known,
            }
        }
    }

    async fn look_up_once(&self, job: &JobId) -> Result<Known, BrokerError> {
        let stream = self.model.results_stream();
        let (result, cancel, attempts) = (
            self.model.result_subject(job),
            self.model.cancel_subject(job),
            self.model.attempts_subject(job),
        );
        let (outcome, cancel, ledger) = futures::try_join!(
            self.broker.last(&stream, &result),
            self.broker.last(&stream, &cancel),
            self.broker.last(&stream, &attempts)
        )?;
        Ok(Known {
            outcome: outcome.map(|message| stored_outcome(&message)),
            cancelled: cancel.is_some(),
            ledger: ledger.as_ref().and_then(read_ledger),
        })
    }

    /// Whether a cancel marker is stored.
    ///
    /// # Errors
    /// When it could not be read.
    pub async fn cancelled(&self, job: &JobId) -> Result<bool, BrokerError> {
        let marker = self.broker.last(&self.model.results_stream(), &self.model.cancel_subject(job)).await?;
        Ok(marker.is_some())
    }

    /// Stores the outcome where there is none.
    ///
    /// # Errors
    /// When it could not be stored, or nobody knows.
    pub async fn create(
        &self,
        outcome: &Outcome,
        envelope: OutcomeEnvelope<'_>,
    ) -> Result<Created, BrokerError> {
        let record = Record {
            stream: self.model.results_stream(),
            subject: self.model.result_subject(&envelope.headers.id),
            headers: self.outcome_headers(outcome, envelope),
            body: outcome.body.clone(),
            lifetime: Some(self.ttl),
        };
        self.put(record, 0).await
    }

    /// Stores a record if the last one on its subject has this sequence; 0 means that there is none. A delete marker
    /// is none. A stream that takes no lifetimes keeps the record for as long as it keeps everything.
    async fn put(&self, record: Record, last_sequence: u64) -> Result<Created, BrokerError> {
        let Record { stream, subject, headers, body, mut lifetime } = record;
        let mut last = last_sequence;
        loop {
            let mut with_lifetime = headers.clone();
            if let Some(lifetime) = lifetime {
                with_lifetime.insert(async_nats::header::NATS_MESSAGE_TTL, whole_seconds(lifetime).as_str());
            }
            match self.broker.create(&subject, with_lifetime, body.clone(), last).await {
                Err(BrokerError::NoLifetimes) if lifetime.is_some() => lifetime = None,
                Ok(Created::Lost) if last == 0 => match self.broker.delete_marker(&stream, &subject).await? {
                    Some(marker) => last = marker,
                    None => return Ok(Created::Lost),
                },
                created => return created,
            }
        }
    }

    /// The job has its outcome: its cancel marker and its ledger live no longer than that. Without an answer of the
    /// broker they live as long as the stream lets them.
    pub async fn release(&self, job: &JobId) {
        let stream = self.model.results_stream();
        for subject in [self.model.cancel_subject(job), self.model.attempts_subject(job)] {
            if let Err(error) = self.release_record(&stream, subject).await {
                tracing::debug!(%job, %error, "a record lives longer than the outcome");
            }
        }
    }

    async fn release_record(&self, stream: &str, subject: String) -> Result<(), BrokerError> {
        let Some(found) = self.broker.last(stream, &subject).await? else { return Ok(()) };
        let released = text(&found, "Nats-TTL").is_some();
        if let (false, Some(sequence)) = (released, sequence_of(&found)) {
            let (headers, body) = (HeaderMap::new(), found.payload.clone());
            let (stream, lifetime) = (stream.to_owned(), Some(self.ttl));
            self.put(Record { stream, subject, headers, body, lifetime }, sequence).await?;
        }
        Ok(())
    }

    /// Publishes a copy of the outcome where the job asked for one. Best effort.
    pub async fn copy(&self, outcome: &Outcome, envelope: OutcomeEnvelope<'_>) {
        let Some(subject) = envelope.headers.reply_subject.clone() else { return };
        let headers = self.outcome_headers(outcome, envelope);
        if let Err(error) =
            self.broker.client().publish_with_headers(subject, headers, outcome.body.clone()).await
        {
            tracing::debug!(job = %envelope.headers.id, %error, "no copy of the outcome");
        }
    }

    fn outcome_headers(&self, outcome: &Outcome, envelope: OutcomeEnvelope<'_>) -> HeaderMap {
        let mut map = HeaderMap::new();
        map.insert(header::RESULT_JOB_ID, envelope.headers.id.as_str());
        map.insert(header::OUTCOME, outcome.kind.as_str());
        map.insert(header::ATTEMPT, envelope.attempt.to_string().as_str());
        map.insert(header::WORKER, self.worker.as_str());
        map.insert(header::MODEL_DIGEST, self.digest.as_str());
        map.insert(header::BODY_DIGEST, envelope.body_digest);
        map.insert(header::QUEUE_WAIT_MS, format!("{:.3}", envelope.queue_wait_ms).as_str());
        map.insert(header::RUN_MS, format!("{:.3}", envelope.run_ms).as_str());
        if !outcome.ignored_fields.is_empty() {
            map.insert(header::IGNORED_FIELDS, header_value(&outcome.ignored_fields).as_str());
        }
        if let Some(trace) = &envelope.headers.traceparent {
            map.insert(header::TRACEPARENT, trace.as_str());
        }
        if let Some(state) = &envelope.headers.tracestate {
            map.insert(header::TRACESTATE, state.as_str());
        }
        map
    }

    /// Keeps a copy of a dead job: its own headers and body, and why it was given up. There may be one already.
    /// The copy has more headers than the job had, so that the largest jobs do not fit: of these the headers are
    /// kept, or those that are ours.
    ///
    /// # Errors
    /// When it could not be stored.
    pub async fn bury(
        &self,
        delivery: &Delivery,
        job: &JobId,
        stored: &StoredOutcome,
    ) -> Result<Created, BrokerError> {
        // The job's own id header would make the broker take a requeued copy for a duplicate, and headers
        // of the broker's own would be obeyed instead of kept.
        let own: Vec<_> = delivery.header_pairs().filter(|(name, _)| !is_brokers(name)).collect();
        let mut too_large = None;
        for (headers, body) in
            [(&own[..], delivery.body.clone()), (&own[..], Bytes::new()), (&[][..], Bytes::new())]
        {
            let mut map = HeaderMap::new();
            headers.iter().for_each(|(name, value)| map.insert(*name, *value));
            if body.len() < delivery.body.len() {
                map.insert(header::BODY_DROPPED, delivery.body.len().to_string().as_str());
            }
            match self.bury_as(delivery, (job, stored), (map, body)).await {
                Err(error @ BrokerError::TooLarge { .. }) => too_large = Some(error),
                other => return other,
            }
        }
        Err(too_large.expect("three tries were too large"))
    }

    async fn bury_as(
        &self,
        delivery: &Delivery,
        (job, stored): (&JobId, &StoredOutcome),
        (mut map, body): (HeaderMap, Bytes),
    ) -> Result<Created, BrokerError> {
        map.insert(header::RESULT_JOB_ID, job.as_str());
        map.insert(header::ATTEMPT, stored.attempt.to_string().as_str());
        map.insert(header::WORKER, self.worker.as_str());
        map.insert(header::REASON, one_line(&stored.reason).as_str());
        map.insert(header::CLASS, delivery.class.as_str());
        let (stream, subject) = (self.model.dead_stream(), self.model.dead_subject(job));
        self.put(Record { stream, subject, headers: map, body, lifetime: None }, 0).await
    }

    /// Replaces the ledger of a job, if it still is the one that was read; 0 means that there was none.
    ///
    /// # Errors
    /// When it could not be stored.
    pub async fn record(
        &self,
        job: &JobId,
        record: &AttemptRecord,
        last_sequence: u64,
    ) -> Result<Created, BrokerError> {
        let body = serde_json::to_vec(record).expect("numbers and strings serialise").into();
        let (stream, subject) = (self.model.results_stream(), self.model.attempts_subject(job));
        let record = Record { stream, subject, headers: HeaderMap::new(), body, lifetime: None };
        self.put(record, last_sequence).await
    }
}

/// A lifetime as the broker reads it: whole seconds, at least one.
fn whole_seconds(lifetime: Duration) -> String {
    let seconds = lifetime.as_secs() + u64::from(lifetime.subsec_nanos() > 0);
    format!("{}s", seconds.max(1))
}

/// Headers that the broker reads itself.
fn is_brokers(name: &str) -> bool {
    name.get(..5).is_some_and(|prefix| prefix.eq_ignore_ascii_case("nats-"))
}

/// Header values are single lines.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MESSAGE_CHARS_MAX).collect()
}

fn text<'a>(message: &'a Message, name: &str) -> Option<&'a str> {
    message.headers.as_ref()?.get(name).map(|value| value.as_str())
}

/// Fields with commas between them. Their names come from callers: what no header may hold is written as `?`, and a
/// list that is too long ends early.
fn header_value(fields: &[String]) -> String {
    let safe = |c: char| if c.is_ascii_graphic() && c != ',' { c } else { '?' };
    let listed =
        fields.iter().map(|field| field.chars().map(safe).collect()).collect::<Vec<String>>().join(",");
    listed.chars().take(MESSAGE_CHARS_MAX).collect()
}

fn stored_outcome(message: &Message) -> StoredOutcome {
    let kind = match text(message, header::OUTCOME) {
        Some("dead") => OutcomeKind::Dead,
        Some("rejected") => OutcomeKind::Rejected,
        _ => OutcomeKind::Completed,
    };
    let error = match kind {
        OutcomeKind::Dead => {
            serde_json::from_slice::<OutputLine>(&message.payload).ok().and_then(|l| l.error)
        }
        _ => None,
    };
    StoredOutcome {
        kind,
        attempt: text(message, header::ATTEMPT).and_then(|value| value.parse().ok()).unwrap_or(1),
        reason: error.map(|error| reason(&error)).unwrap_or_default(),
        of: AnswerOf::read(message.headers.as_ref()),
    }
}

/// Why a job is dead, as its dead letter says it.
pub fn reason(error: &LineError) -> String {
    format!("{}: {}", error.code.as_str(), error.message)
}

fn read_ledger(message: &Message) -> Option<(AttemptRecord, u64)> {
    let record = serde_json::from_slice(&message.payload).ok()?;
    Some((record, sequence_of(message)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_output_lines() {
        let job: JobId = "a-1".parse().unwrap();
        let long = "x".repeat(MESSAGE_CHARS_MAX + 5);
        let outcome = Outcome::failed(OutcomeKind::Rejected, &job, ErrorCode::Cancelled, &long);
        let line: OutputLine = serde_json::from_slice(&outcome.body).unwrap();
        assert_eq!((line.id.as_str(), line.response), ("a-1", None));
        let error = line.error.unwrap();
        assert_eq!((error.code, error.message.len()), (ErrorCode::Cancelled, MESSAGE_CHARS_MAX));
        assert_eq!(one_line("a\r\nb"), "a  b");
        let lifetimes = [1, 1000, 1001, 86_400_000].map(|ms| whole_seconds(Duration::from_millis(ms)));
        assert_eq!(lifetimes, ["1s", "1s", "2s", "86400s"]);
        assert!(is_brokers("nats-msg-id") && !is_brokers("Millrace-Stream") && !is_brokers("né"));
    }
}
