//! A request as a job: published once, its outcome awaited, cancelled when nobody waits for it any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::publish::PublishAck;
use bytes::Bytes;
use millrace_crds::job::{JSON, header};
use millrace_crds::names::{JobId, ModelRef};
use millrace_crds::result::LineError;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::cancel;
use crate::http::cache::{self, CacheKey};
use crate::http::caller::RequestContext;
use crate::http::claimed;
use crate::http::error::{ApiCode, ApiError};
use crate::http::fair::desk::FairPlace;
use crate::http::front::Front;
use crate::http::limits::estimate::{estimate, usage};
use crate::http::limits::window::Amounts;
use crate::http::limits::{RateStanding, RateTicket};
use crate::http::waiting::Pending;
use crate::outcome::CollectedOutcome;
use crate::publish::{self, JobEnvelope, Next, Payload};

/// How long a publish is tried while the broker does not answer.
const PUBLISH_PATIENCE: Duration = Duration::from_secs(5);
/// Pause between two tries.
const PUBLISH_PAUSE: Duration = Duration::from_millis(100);
/// How much later than the job's deadline its outcome is given up: workers write what became of it.
const OUTCOME_GRACE: Duration = Duration::from_secs(5);

/// A job to publish.
#[derive(Debug)]
pub struct JobOrder {
    /// Its id.
    pub id: JobId,
    /// The request, whose caller is known.
    pub context: Arc<RequestContext>,
    /// Whose queue.
    pub model: ModelRef,
    /// Its headers.
    pub envelope: JobEnvelope,
    /// Its body: one request.
    pub body: Bytes,
    /// How long until the deadline that the envelope says.
    pub time: Duration,
    /// Whether the answer may come from a stored outcome.
    pub cache: bool,
}

/// A job whose outcome is awaited. Dropped before the outcome came, the job is cancelled.
#[derive(Debug)]
pub struct AwaitedJob {
    front: Arc<Front>,
    /// Its id.
    pub id: JobId,
    /// Whose queue.
    pub model: ModelRef,
    /// Its place there; 0 where a stored outcome answers it.
    pub sequence: u64,
    pending: Pending,
    over_at: Instant,
    /// Whether a worker may have it.
    at_large: bool,
    /// Whether it was published: its tokens count.
    published: bool,
    ticket: RateTicket,
    place: Option<FairPlace>,
    /// The stored outcome that answers it.
    ready: Option<CollectedOutcome>,
    /// What to remember its outcome as.
    cache_key: Option<CacheKey>,
}

impl AwaitedJob {
    /// Publishes a job, once its caller's limits let it in and it is its tenant's turn; one that a stored outcome
    /// answers is not published.
    ///
    /// # Errors
    /// [`ApiCode::RateLimitExceeded`], [`ApiCode::QueueFull`], [`ApiCode::BrokerUnavailable`],
    /// [`ApiCode::RequestTooLarge`].
    pub async fn publish(front: &Arc<Front>, mut order: JobOrder) -> Result<Self, ApiError> {
        let caller = order.context.caller()?;
        let mut job = Self {
            ticket: admit(front, &order.context, &order.body).await?,
            front: front.clone(),
            pending: front.waiters.wait(&order.model, &order.id),
            id: order.id.clone(),
            model: order.model.clone(),
            sequence: 0,
            over_at: Instant::now() + order.time + OUTCOME_GRACE,
            at_large: false,
            published: false,
            place: None,
            ready: None,
            cache_key: None,
        };
        if order.cache && job.find(&order).await? {
            return Ok(job);
        }
        front.room.check(&job.model, order.envelope.class)?;
        let payload = payload(front, order.body).await?;
        let joined = front.fair.join(&job.model, caller, order.time).await;
        job.place = joined.inspect_err(|_| front.metrics.limited(None))?;
        order.envelope.reply = Some(front.waiters.reply_subject(&order.id));
        (job.at_large, job.published) = (true, true);
        let sent = publish(front, &job.model, (header::JOB_ID, &job.id), &order.envelope, payload).await;
        match &sent {
            Ok(ack) => job.sequence = ack.sequence,
            // The broker said that it did not take the job: there is nothing to cancel.
            Err(error) => {
                job.at_large = error.code == ApiCode::BrokerUnavailable;
                job.published = job.at_large;
            }
        }
        sent.map(|_| job)
    }

    /// From now on the job runs, whether or not somebody waits for it.
    pub fn let_go(&mut self) {
        self.at_large = false;
    }

    /// Whether a stored outcome answers the request.
    async fn find(&mut self, order: &JobOrder) -> Result<bool, ApiError> {
        let front = self.front.clone();
        let Some(key) = front.cache.key(order.context.caller()?, &self.model, &order.body) else {
            return Ok(false);
        };
        let found = front.cache.find(&front.connection(&self.model), &key).await;
        if let Some(mut outcome) = found
            && claimed::fetch(&front, &mut outcome).await.is_ok()
            && cache::is_answer(&outcome.body)
            && let Some(body) = front.memory.keep(outcome.body)
        {
            front.metrics.cache_hits.inc();
            let _ = order.context.cached.set(Some(outcome.job.clone()));
            self.ready = Some(CollectedOutcome { body, ..outcome });
            return Ok(true);
        }
        front.metrics.cache_misses.inc();
        let _ = order.context.cached.set(None);
        self.cache_key = Some(key);
        Ok(false)
    }

    /// The outcome, with its body fetched from wherever it is. The call may be given up and made again.
    ///
    /// # Errors
    /// [`ApiCode::OutcomeUnreadable`]; a deadline exceeded when none came in time.
    pub async fn outcome(&mut self) -> Result<CollectedOutcome, ApiError> {
        let mut outcome = self.stored().await?;
        claimed::fetch(&self.front, &mut outcome).await?;
        if self.published {
            self.ticket.settle(|| usage(&outcome.body));
        }
        if let Some(key) = self.cache_key.take()
            && cache::is_answer(&outcome.body)
        {
            self.front.cache.remember(key, &outcome);
        }
        Ok(outcome)
    }

    /// What the request came to, of one whose outcome was not read here.
    pub fn settle(&mut self, actual: Amounts) {
        self.ticket.settle(|| actual);
    }

    /// The outcome as it is stored: its body may be a reference. The call may be given up and made again.
    ///
    /// # Errors
    /// A deadline exceeded when none came in time.
    pub async fn stored(&mut self) -> Result<CollectedOutcome, ApiError> {
        if let Some(outcome) = &self.ready {
            return Ok(outcome.clone());
        }
        let left = self.over_at.saturating_duration_since(Instant::now());
        let Ok(outcome) = tokio::time::timeout(left, self.pending.outcome()).await else {
            let code = millrace_crds::result::ErrorCode::DeadlineExceeded;
            return Err(ApiError::new(ApiCode::Job(code), "no worker answered before the job's deadline"));
        };
        self.at_large = false;
        if let Some(mut place) = self.place.take()
            && let (Some(waited), Some(ran)) = (outcome.queue_wait_ms, outcome.run_ms)
        {
            place.took(waited, ran);
        }
        self.ready = Some(outcome.clone());
        Ok(outcome)
    }
}

/// Lets a request in as far as its caller's limits do; it runs until the ticket is dropped.
///
/// # Errors
/// [`ApiCode::RateLimitExceeded`], [`ApiCode::Overloaded`].
pub async fn admit(front: &Front, context: &RequestContext, body: &[u8]) -> Result<RateTicket, ApiError> {
    let mut standing = RateStanding::default();
    let told = (&mut standing, &front.metrics);
    let admitted = front.limits.admit(context.caller()?, || estimate(body), told).await;
    let _ = context.standing.set(standing);
    admitted
}

impl Drop for AwaitedJob {
    fn drop(&mut self) {
        if !self.published {
            self.ticket.settle(|| [1, 0, 0]);
        }
        if !self.at_large {
            return;
        }
        self.front.metrics.cancelled.inc();
        let (broker, job) = (self.front.connection(&self.model), self.id.clone());
        self.front.cancels.spawn(async move {
            if let Err(error) = cancel::mark(&broker, &job).await {
                tracing::warn!(%job, %error, "a job that nobody waits for was not cancelled");
            }
        });
    }
}

/// Publishes a job, which a header names, and gives what the broker says of it.
///
/// # Errors
/// [`ApiCode::QueueFull`], [`ApiCode::BrokerUnavailable`].
pub async fn publish(
    front: &Front,
    model: &ModelRef,
    (id_header, id): (&str, &JobId),
    envelope: &JobEnvelope,
    payload: Payload,
) -> Result<PublishAck, ApiError> {
    let broker = front.connection(model);
    let subject = model.jobs_subject(envelope.class);
    let over_at = Instant::now() + PUBLISH_PATIENCE;
    loop {
        let message = envelope.message(model, (id_header, id), JSON, payload.clone());
        let publishing = publish::publish_one(&broker, subject.clone(), message);
        let left = over_at.saturating_duration_since(Instant::now());
        let error = match tokio::time::timeout(left, publishing).await {
            Ok(Ok(ack)) => {
                front.metrics.published.inc();
                return Ok(ack);
            }
            Ok(Err(error)) => error,
            Err(_) => return Err(unavailable()),
        };
        match publish::next(&error) {
            Next::WaitForRoom => {
                let message = format!("the queue of model {} is full", model.name);
                return Err(ApiError::new(ApiCode::QueueFull, message));
            }
            Next::Repeat if Instant::now() < over_at => tokio::time::sleep(PUBLISH_PAUSE).await,
            Next::Repeat => return Err(unavailable()),
            Next::GiveUp => {
                tracing::error!(job = %id, %error, "the broker refused a job");
                return Err(ApiError::new(ApiCode::Internal, "the broker refused the job"));
            }
        }
    }
}

/// A body in the message or, if it is too large for one, in the object store.
///
/// # Errors
/// [`ApiCode::RequestTooLarge`], [`ApiCode::BrokerUnavailable`].
pub async fn payload(front: &Front, body: Bytes) -> Result<Payload, ApiError> {
    let limit = front.message_bytes_max();
    if body.len() <= limit {
        return Ok(Payload::Body(body));
    }
    let Some(prefix) = &front.args.object_store else {
        let message = format!("the body has {} bytes; {limit} are allowed", body.len());
        return Err(ApiError::new(ApiCode::RequestTooLarge, message));
    };
    let put = Box::pin(front.bodies.put(prefix, body)).await;
    put.map(Payload::At).map_err(|failure| {
        tracing::error!(%failure, "a body was not stored");
        ApiError::new(ApiCode::BrokerUnavailable, "the object store does not take the body")
    })
}

fn unavailable() -> ApiError {
    ApiError::new(ApiCode::BrokerUnavailable, "the broker did not acknowledge the job")
}

/// A stored line with its answer as the bytes that were stored.
#[derive(Debug, Deserialize)]
struct RawLine<'a> {
    #[serde(borrow)]
    response: Option<RawResponse<'a>>,
    error: Option<LineError>,
}

#[derive(Debug, Deserialize)]
struct RawResponse<'a> {
    status_code: u16,
    #[serde(borrow)]
    body: &'a RawValue,
}

/// The status and the bytes of the answer that an outcome of one request holds.
///
/// # Errors
/// What the outcome says, or [`ApiCode::OutcomeUnreadable`].
pub fn answer_of(outcome: &CollectedOutcome) -> Result<(u16, Bytes), ApiError> {
    let unreadable = || ApiError::new(ApiCode::OutcomeUnreadable, "the stored outcome is no output line");
    let line: RawLine<'_> = serde_json::from_slice(&outcome.body).map_err(|_| unreadable())?;
    match (line.response, line.error) {
        (Some(answer), _) => Ok((answer.status_code, outcome.body.slice_ref(answer.body.get().as_bytes()))),
        (None, Some(error)) => Err(ApiError::of_job(&error)),
        (None, None) => Err(unreadable()),
    }
}

#[cfg(test)]
mod tests {
    use async_nats::HeaderMap;
    use millrace_crds::result::ErrorCode;

    use super::*;

    fn outcome(body: &str) -> CollectedOutcome {
        let mut headers = HeaderMap::new();
        headers.insert("Millrace-Outcome", "completed");
        CollectedOutcome::from_parts("j".parse().unwrap(), &headers, Bytes::copy_from_slice(body.as_bytes()))
    }

    #[test]
    fn an_answer_is_the_stored_bytes() {
        // Neither the order of keys, nor the spelling of numbers, nor spaces are touched.
        let body = r#"{"z":1.10,"a":[1e-7,"é\u00e9"], "logprob":-0.30000000000000004}"#;
        let response = format!(r#"{{"status_code":200,"request_id":"j","body":{body}}}"#);
        let line = format!(r#"{{"id":"j","custom_id":"j","response":{response},"error":null}}"#);
        assert_eq!(answer_of(&outcome(&line)).unwrap(), (200, Bytes::copy_from_slice(body.as_bytes())));
    }

    #[test]
    fn an_error_is_told() {
        let error = r#"{"code":"INVALID_REQUEST","message":"temperature: 101 is not 0 to 100"}"#;
        let line = format!(r#"{{"id":"j","custom_id":"j","response":null,"error":{error}}}"#);
        let told = answer_of(&outcome(&line)).unwrap_err();
        assert_eq!(told.code, ApiCode::Job(ErrorCode::InvalidRequest));
        assert_eq!(told.param.as_deref(), Some("temperature"));
        for none in ["", "{}", "[]", r#"{"response":null,"error":null}"#] {
            assert_eq!(answer_of(&outcome(none)).unwrap_err().code, ApiCode::OutcomeUnreadable, "{none}");
        }
    }
}
