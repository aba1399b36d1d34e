//! `/v1/jobs`: a request that nobody waits for. It is submitted, looked at and cancelled, from any gateway.
//!
//! A job's name over HTTP holds all that is needed to find it, `<namespace>.<model>.<sequence>.<job>`, so that no
//! gateway has to remember it. Its place in the stream tells a job that waits or runs from one that never was. The
//! job's own id begins with a hash of its tenant: the jobs of others are as good as none.

pub mod dead;
pub mod stream;

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::DirectGetErrorKind;
use axum::extract::{Path, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use hex::ToHex;
use millrace_crds::job::header;
use millrace_crds::names::{JobId, ModelRef};
use millrace_crds::result::ErrorCode;
use millrace_crds::units::Span;
use serde::Serialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::http::awaited;
use crate::http::caller::RequestContext;
use crate::http::claimed;
use crate::http::document;
use crate::http::error::{ApiCode, ApiError};
use crate::http::front::Front;
use crate::http::inference::{Asked, envelope, read_json, text};
use crate::http::keys::Verb;
use crate::outcome::CollectedOutcome;
use crate::publish::{self, JobEnvelope, JobStanding, Payload};
use crate::{cancel as marker, follow};

/// Latest deadline of a job.
pub const TIME_MAX: Span = Span(Duration::from_secs(7 * 24 * 3600));
/// How long the broker may take to say what it knows of a job.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// The request header under which a job is submitted once, however often it is sent.
const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Longest of these, in bytes.
const KEY_BYTES_MAX: usize = 256;
/// Hex digits of the key in such a job's id: 128 bits.
const KEY_DIGITS: usize = 32;
/// Hex digits of the tenant in the id of each job: 64 bits.
const TENANT_DIGITS: usize = 16;

/// A job's name over HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobName {
    /// Whose queue.
    pub model: ModelRef,
    /// Its place in the stream of jobs; 0 where it was done before it was submitted again.
    pub sequence: u64,
    /// The job's own id.
    pub job: JobId,
}

impl JobName {
    /// Reads a name; `None` for what is none.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let (namespace, name, sequence, job) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let name = Self {
            model: ModelRef::new(namespace, name).ok()?,
            sequence: sequence.parse().ok()?,
            job: job.parse().ok()?,
        };
        // Each job has one name: no leading zeros, nothing behind it.
        (name.text() == text).then_some(name)
    }

    /// The name as it is written.
    pub fn text(&self) -> String {
        format!("{}.{}.{}.{}", self.model.namespace, self.model.name, self.sequence, self.job)
    }
}

/// A job as clients see it.
#[derive(Debug, Serialize)]
pub struct JobObject {
    id: String,
    object: &'static str,
    model: String,
    /// `queued` while it waits or runs, or how it ended.
    status: &'static str,
    /// The stored outcome.
    outcome: Option<Box<RawValue>>,
}

/// Submits a job, and does not wait for it
///
/// The body is that of a chat completion or of a completion.
#[utoipa::path(post, path = "/v1/jobs", tag = "Jobs",
    request_body(content = ref("#/components/schemas/JobRequest"), content_type = "application/json"),
    params(document::AskHeaders,
        ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 256,
            description = "Equal keys of one tenant are one job")),
    responses((status = 202, description = "It is queued", body = ref("#/components/schemas/Job")),
        (status = 200, description = "It was submitted before, and has ended",
            body = ref("#/components/schemas/Job"))))]
pub async fn submit(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    request: Request,
) -> Result<Response, ApiError> {
    let caller = context.caller()?;
    caller.may(Verb::Jobs)?;
    let _place = front.admit()?;
    let (head, body) = request.into_parts();
    let body = read_json(&front, &head.headers, body).await?;
    let asked = Asked::read(None, &body)?;
    let model = front.catalog.find(&asked.model, &caller.scopes).await?.model;
    let _ = context.model.set(model.clone());
    let _ticket = awaited::admit(&front, &context, &body).await?;
    let (envelope, _) = envelope(&front, caller, &head.headers, TIME_MAX)?;
    let envelope = JobEnvelope { stream: asked.stream, ..envelope };
    let job = match text(&head.headers, IDEMPOTENCY_KEY)? {
        None => id_of_request(&caller.tenant, &context.id),
        Some(key) => id_of_key(&caller.tenant, key)?,
    };
    let done = JobName { model, sequence: 0, job };
    let payload = awaited::payload(&front, body).await?;
    if let Some(outcome) = stored(&front, &done).await? {
        if !outcome.of.is_of_body(&payload.digest()) {
            return Err(reused());
        }
        return answer(&front, &done, Some(&outcome)).await;
    }
    front.room.check(&done.model, envelope.class)?;
    let sequence = publish_once(&front, &done, &envelope, payload).await?;
    let name = JobName { sequence, ..done };
    Ok((StatusCode::ACCEPTED, answer(&front, &name, None).await?).into_response())
}

/// Publishes a job that has no outcome, unless it lies in the queue already, and gives its place there.
///
/// That the broker knows the id is no promise that the job is there: its queue may have been purged. Then the job is
/// published again, named in a way that the broker does not compare.
async fn publish_once(
    front: &Front,
    name: &JobName,
    envelope: &JobEnvelope,
    payload: Payload,
) -> Result<u64, ApiError> {
    let digest = payload.digest();
    let (model, job) = (&name.model, &name.job);
    let ack = awaited::publish(front, model, (header::JOB_ID, job), envelope, payload.clone()).await?;
    if !ack.duplicate {
        return Ok(ack.sequence);
    }
    let broker = front.connection(model);
    let looking = async {
        publish::standing(&broker, (job, digest.as_str()), ack.sequence).await.map_err(|error| {
            tracing::warn!(%job, %error, "a job that was submitted before cannot be looked up");
            unavailable()
        })
    };
    match soon(looking).await? {
        JobStanding::There => Ok(ack.sequence),
        JobStanding::OtherBody => Err(reused()),
        JobStanding::Gone => {
            let again = (header::RESULT_JOB_ID, job);
            Ok(awaited::publish(front, model, again, envelope, payload).await?.sequence)
        }
    }
}

/// How the ids of all jobs of a tenant begin, and of nobody else's.
pub fn prefix_of(tenant: &str) -> String {
    let digits: String = Sha256::digest(tenant).encode_hex();
    format!("job-{}-", &digits[..TENANT_DIGITS])
}

/// The id of a job that is submitted by this request alone.
pub fn id_of_request(tenant: &str, request: &JobId) -> JobId {
    format!("{}{request}", prefix_of(tenant)).parse().expect("two short ids make an id")
}

/// The id of a job that is submitted once: nobody of another tenant has the same.
fn id_of_key(tenant: &str, key: &str) -> Result<JobId, ApiError> {
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        let message = format!("it has {} bytes; 1 to {KEY_BYTES_MAX} are allowed", key.len());
        return Err(ApiError::of(ApiCode::InvalidParameter, IDEMPOTENCY_KEY, message));
    }
    let mut hash = Sha256::new();
    for part in [tenant, key] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let digits: String = hash.finalize().encode_hex();
    let id = format!("{}once-{}", prefix_of(tenant), &digits[..KEY_DIGITS]);
    Ok(id.parse().expect("hex makes an id"))
}

/// Looks at a job
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "Jobs",
    params(("id" = String, Path, description = "The job's id")),
    responses((status = 200, description = "The job", body = ref("#/components/schemas/Job"))))]
pub async fn look(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let _place = front.admit()?;
    let name = named(&front, &context, &id, Verb::Jobs).await?;
    let outcome = state_of(&front, &name).await?;
    answer(&front, &name, outcome.as_ref()).await
}

/// Asks for a job's end
///
/// It is a wish; the outcome says what became of it.
#[utoipa::path(post, path = "/v1/jobs/{id}/cancel", tag = "Jobs",
    params(("id" = String, Path, description = "The job's id")),
    responses((status = 200, description = "The job as it was", body = ref("#/components/schemas/Job"))))]
pub async fn cancel(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let _place = front.admit()?;
    let name = named(&front, &context, &id, Verb::Jobs).await?;
    let outcome = state_of(&front, &name).await?;
    if outcome.is_none() {
        mark(&front, &name).await?;
    }
    answer(&front, &name, outcome.as_ref()).await
}

/// Cancels a job.
///
/// # Errors
/// [`ApiCode::BrokerUnavailable`].
pub async fn mark(front: &Front, name: &JobName) -> Result<(), ApiError> {
    let broker = front.connection(&name.model);
    let marking = async {
        marker::mark(&broker, &name.job).await.map_err(|failure| {
            tracing::warn!(job = %name.job, %failure, "a job was not cancelled");
            unavailable()
        })
    };
    soon(marking).await
}

/// The job that a path names, if it is of the caller's tenant and the caller may see its model.
///
/// # Errors
/// [`ApiCode::JobNotFound`], [`ApiCode::InsufficientPermissions`], [`ApiCode::BrokerUnavailable`].
pub async fn named(
    front: &Front,
    context: &RequestContext,
    id: &str,
    verb: Verb,
) -> Result<JobName, ApiError> {
    let caller = context.caller()?;
    caller.may(verb)?;
    let prefix = prefix_of(&caller.tenant);
    let own = JobName::parse(id).filter(|name| name.job.as_str().starts_with(&prefix));
    let name = own.ok_or_else(missing)?;
    // Where there is no such model there is no stream to ask either.
    front.catalog.find(&name.model.to_string(), &caller.scopes).await.map_err(|error| match error.code {
        ApiCode::ModelNotFound => missing(),
        _ => error,
    })?;
    let _ = context.model.set(name.model.clone());
    Ok(name)
}

/// A job's outcome, if it has one; without one it waits or runs.
///
/// # Errors
/// [`ApiCode::JobNotFound`], [`ApiCode::BrokerUnavailable`].
pub async fn state_of(front: &Front, name: &JobName) -> Result<Option<CollectedOutcome>, ApiError> {
    if let Some(outcome) = stored(front, name).await? {
        return Ok(Some(outcome));
    }
    if soon(waits(front, name)).await? {
        return Ok(None);
    }
    // Between the two looks the job may have got its outcome and left the queue.
    stored(front, name).await?.ok_or_else(missing).map(Some)
}

/// The outcome that is stored; its body may lie elsewhere.
///
/// # Errors
/// [`ApiCode::BrokerUnavailable`], [`ApiCode::Overloaded`].
pub async fn stored(front: &Front, name: &JobName) -> Result<Option<CollectedOutcome>, ApiError> {
    let broker = front.connection(&name.model);
    let looking = async {
        follow::stored(&broker, std::slice::from_ref(&name.job)).await.map_err(|failure| {
            tracing::warn!(job = %name.job, %failure, "an outcome cannot be looked up");
            unavailable()
        })
    };
    let Some(outcome) = soon(looking).await?.pop() else { return Ok(None) };
    let mut held = front.memory.nothing();
    held.grow(outcome.body.len())?;
    Ok(Some(CollectedOutcome { body: held.with(outcome.body), ..outcome }))
}

/// Whether the job lies in the queue, where it waits or runs.
async fn waits(front: &Front, name: &JobName) -> Result<bool, ApiError> {
    Ok(message(front, name).await?.is_some())
}

/// Choices for each prompt of a job that lies in the queue, if its body lies there too.
///
/// # Errors
/// [`ApiCode::BrokerUnavailable`].
pub async fn choices_of(front: &Front, name: &JobName) -> Result<Option<u32>, ApiError> {
    let message = soon(message(front, name)).await?;
    Ok(message.and_then(|message| Asked::read(None, &message.payload).ok()).map(|asked| asked.n))
}

/// A job's message, as long as it lies in the queue.
async fn message(front: &Front, name: &JobName) -> Result<Option<StreamMessage>, ApiError> {
    if name.sequence == 0 {
        return Ok(None);
    }
    let away = |e: &dyn std::fmt::Display| {
        tracing::warn!(job = %name.job, error = %e, "a job cannot be looked up");
        unavailable()
    };
    let stream = match front.connection(&name.model).jetstream.get_stream(name.model.jobs_stream()).await {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), GetStreamErrorKind::JetStream(_)) => return Ok(None),
        Err(error) => return Err(away(&error)),
    };
    match stream.direct_get(name.sequence).await {
        Ok(message) => {
            let id = message.headers.get(header::RESULT_JOB_ID).or(message.headers.get(header::JOB_ID));
            let own = id.is_some_and(|id| id.as_str() == name.job.as_str());
            Ok(own.then_some(message))
        }
        Err(error) if error.kind() == DirectGetErrorKind::NotFound => Ok(None),
        Err(error) => Err(away(&error)),
    }
}

/// A job as clients see it; an outcome that lies in an object store is sent on from there.
async fn answer(
    front: &Front,
    name: &JobName,
    outcome: Option<&CollectedOutcome>,
) -> Result<Response, ApiError> {
    let claimed = outcome.and_then(|outcome| Some((outcome, outcome.reference()?)));
    let Some((outcome, reference)) = claimed else {
        return Ok(Json(object(front, name, outcome)?).into_response());
    };
    let job = JobObject { status: outcome.kind.as_str(), ..object(front, name, None)? };
    let text = serde_json::to_string(&job).map_err(|error| unreadable(name, &error))?;
    let before = text.strip_suffix("null}").ok_or_else(|| unreadable(name, &text))?;
    claimed::sent_on(front, outcome, &reference, (before.to_owned(), "}")).await
}

/// A job as clients see it.
///
/// # Errors
/// [`ApiCode::OutcomeUnreadable`].
pub fn object(
    front: &Front,
    name: &JobName,
    outcome: Option<&CollectedOutcome>,
) -> Result<JobObject, ApiError> {
    let line = outcome.map(|outcome| {
        let text = String::from_utf8_lossy(&outcome.body).trim().to_owned();
        RawValue::from_string(text).map_err(|error| unreadable(name, &error))
    });
    Ok(JobObject {
        id: name.text(),
        object: "job",
        model: front.catalog.id_of(&name.model),
        status: outcome.map_or("queued", |outcome| outcome.kind.as_str()),
        outcome: line.transpose()?,
    })
}

/// What the broker says of a job, or that it is not there.
async fn soon<T>(asking: impl Future<Output = Result<T, ApiError>>) -> Result<T, ApiError> {
    tokio::time::timeout(LOOK_TIMEOUT, asking).await.unwrap_or_else(|_| Err(unavailable()))
}

fn reused() -> ApiError {
    let message = "a job with another body was submitted under this key; give another key";
    ApiError::of(ApiCode::Job(ErrorCode::IdReused), IDEMPOTENCY_KEY, message)
}

fn missing() -> ApiError {
    ApiError::new(ApiCode::JobNotFound, "there is no such job, or its outcome has expired")
}

fn unavailable() -> ApiError {
    ApiError::new(ApiCode::BrokerUnavailable, "the broker does not answer")
}

fn unreadable(name: &JobName, reason: &dyn std::fmt::Display) -> ApiError {
    tracing::error!(job = %name.job, %reason, "an outcome cannot be read");
    ApiError::new(ApiCode::OutcomeUnreadable, "the stored outcome cannot be read")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_has_one_name() {
        let name = JobName::parse("team-a.m.7.req-1").unwrap();
        assert_eq!(
            (name.model.to_string().as_str(), name.sequence, name.job.as_str()),
            ("team-a/m", 7, "req-1")
        );
        for wrong in
            ["", "a.b.7", "a.b.07.x", "a.b.+7.x", "a.b.7.x.y", "A.b.7.x", "a.b.7.-", "a.*.7.x", "a.b.-1.x"]
        {
            assert_eq!(JobName::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn an_id_is_its_tenants_own() {
        let request: JobId = "req-0123456789abcdef0123456789abcdef".parse().unwrap();
        // As `printf team-a | sha256sum` begins.
        assert_eq!(prefix_of("team-a"), "job-96c2886c51d1dfb4-");
        assert_eq!(
            id_of_request("team-a", &request).as_str(),
            "job-96c2886c51d1dfb4-req-0123456789abcdef0123456789abcdef"
        );
        assert_ne!(prefix_of("team-a"), prefix_of("team-b"));
        assert!(id_of_key("team-a", "k").unwrap().as_str().starts_with("job-96c2886c51d1dfb4-once-"));
    }

    #[test]
    fn an_idempotency_key_is_its_tenants_own() {
        let id = |tenant, key| id_of_key(tenant, key).unwrap();
        assert_eq!(id("a", "k"), id("a", "k"));
        assert_ne!(id("a", "k"), id("a", "l"));
        let key = |id: JobId| id.as_str().rsplit('-').next().map(str::to_owned);
        assert_ne!(key(id("a", "bk")), key(id("ab", "k")));
        let long = "k".repeat(KEY_BYTES_MAX + 1);
        for wrong in ["", &long] {
            assert_eq!(id_of_key("a", wrong).unwrap_err().param.as_deref(), Some(IDEMPOTENCY_KEY));
        }
    }
}
