//! `/v1/chat/completions` and `/v1/completions`: a body becomes a job as it came, and the job's outcome the answer.
//!
//! The gateway reads of a body only what it needs to find the queue and to stream; the rest is for the worker to judge,
//! whose refusals come back as OpenAI's errors.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::body::HttpBody;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt;
use millrace_crds::names::Class;
use millrace_crds::units::Span;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::http::awaited::{AwaitedJob, JobOrder, answer_of};
use crate::http::cache::CACHE;
use crate::http::caller::{Caller, RequestContext};
use crate::http::chunk::ChunkForm;
use crate::http::claimed::ClaimedLine;
use crate::http::document;
use crate::http::error::{ApiCode, ApiError};
use crate::http::front::Front;
use crate::http::keys::Verb;
use crate::http::memory::HeldMemory;
use crate::http::stream;
use crate::publish::JobEnvelope;

/// The request header with the job's class.
const CLASS: &str = "millrace-class";
/// The request header with the job's deadline: a span such as `90s`, or an RFC 3339 time.
const DEADLINE: &str = "millrace-deadline";
/// Of a body that is too large, this much is read and thrown away, so that its sender gets to read the answer.
const DISCARDED_BYTES_MAX: usize = 64 << 20;

/// Which of OpenAI's two forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/chat/completions`
    Chat,
    /// `/v1/completions`
    Completions,
}

impl Endpoint {
    /// The field with the input.
    fn input(self) -> &'static str {
        match self {
            Endpoint::Chat => "messages",
            Endpoint::Completions => "prompt",
        }
    }
}

/// What the gateway reads of a body. `null` is absent.
#[derive(Debug, Deserialize)]
struct Fields<'a> {
    model: Option<Value>,
    stream: Option<Value>,
    stream_options: Option<Value>,
    n: Option<Value>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
}

/// A body, as far as the gateway reads it.
#[derive(Debug, PartialEq, Eq)]
pub struct Asked {
    /// What it calls the model.
    pub model: String,
    /// Whether the answer shall be streamed.
    pub stream: bool,
    /// Whether the stream shall end with the usage.
    pub include_usage: bool,
    /// Choices for each prompt.
    pub n: u32,
}

impl Asked {
    /// Reads a body of one form, or of either.
    ///
    /// # Errors
    /// [`ApiCode::InvalidJson`], [`ApiCode::MissingParameter`], [`ApiCode::InvalidParameter`].
    pub fn read(endpoint: Option<Endpoint>, body: &[u8]) -> Result<Self, ApiError> {
        let invalid = |reason: &dyn std::fmt::Display| {
            ApiError::new(ApiCode::InvalidJson, format!("the body is not a JSON object: {reason}"))
        };
        // An array would be taken for the fields in their order.
        if body.trim_ascii_start().first() == Some(&b'[') {
            return Err(invalid(&"it is an array"));
        }
        let fields: Fields<'_> = serde_json::from_slice(body).map_err(|error| invalid(&error))?;
        let input = match endpoint {
            Some(Endpoint::Chat) => fields.messages,
            Some(Endpoint::Completions) => fields.prompt,
            None => fields.messages.or(fields.prompt),
        };
        if input.is_none() {
            let input = endpoint.unwrap_or(Endpoint::Chat).input();
            return Err(ApiError::of(ApiCode::MissingParameter, input, "missing"));
        }
        let include_usage = fields.stream_options.as_ref().and_then(|options| options.get("include_usage"));
        Ok(Self {
            model: match fields.model {
                Some(Value::String(name)) => name,
                Some(other) => return Err(wrong("model", &other, "a model's name")),
                None => return Err(ApiError::of(ApiCode::MissingParameter, "model", "missing")),
            },
            stream: truth("stream", fields.stream.as_ref())?,
            include_usage: truth("stream_options.include_usage", include_usage)?,
            // What is no sound number is refused by the worker.
            n: fields.n.and_then(|n| n.as_u64()).and_then(|n| n.try_into().ok()).unwrap_or(1),
        })
    }
}

fn truth(field: &str, value: Option<&Value>) -> Result<bool, ApiError> {
    match value {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(truth)) => Ok(*truth),
        Some(other) => Err(wrong(field, other, "true or false")),
    }
}

fn wrong(field: &str, value: &Value, expected: &str) -> ApiError {
    let shown: String = value.to_string().chars().take(80).collect();
    ApiError::of(ApiCode::InvalidParameter, field, format_args!("{shown} is not {expected}"))
}

/// Answers a chat, whole or streamed
#[utoipa::path(post, path = "/v1/chat/completions", tag = "Inference",
    request_body(content = ref("#/components/schemas/ChatRequest"), content_type = "application/json"),
    params(document::AskHeaders),
    responses((status = 200, description = "The answer, or its chunks where `stream` is true", content(
        (ref("#/components/schemas/ChatCompletion") = "application/json"), (String = "text/event-stream")))))]
pub async fn chat(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    request: Request,
) -> Result<Response, ApiError> {
    answer(&front, &context, Endpoint::Chat, request).await
}

/// Completes one prompt or a list of them, whole or streamed
#[utoipa::path(post, path = "/v1/completions", tag = "Inference",
    request_body(content = ref("#/components/schemas/CompletionRequest"), content_type = "application/json"),
    params(document::AskHeaders),
    responses((status = 200, description = "The answer, or its chunks where `stream` is true", content(
        (ref("#/components/schemas/Completion") = "application/json"), (String = "text/event-stream")))))]
pub async fn completions(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    request: Request,
) -> Result<Response, ApiError> {
    answer(&front, &context, Endpoint::Completions, request).await
}

async fn answer(
    front: &Arc<Front>,
    context: &Arc<RequestContext>,
    endpoint: Endpoint,
    request: Request,
) -> Result<Response, ApiError> {
    let caller = context.caller()?;
    caller.may(Verb::Infer)?;
    let place = front.admit()?;
    let (head, body) = request.into_parts();
    let body = read_json(front, &head.headers, body).await?;
    let asked = Asked::read(Some(endpoint), &body)?;
    let model = front.catalog.find(&asked.model, &caller.scopes).await?.model;
    let _ = context.model.set(model.clone());
    let limit = front.args.timeout;
    let (envelope, time) = envelope(front, caller, &head.headers, limit)?;
    let envelope = JobEnvelope { stream: asked.stream, ..envelope };
    let cache = text(&head.headers, CACHE)?;
    let cache = caller.cache.unwrap_or(front.args.bounds.cache).allows(cache)?;
    let order =
        JobOrder { id: context.id.clone(), context: context.clone(), model, envelope, body, time, cache };
    if asked.stream {
        let form = ChunkForm {
            id: order.id.clone(),
            created: OffsetDateTime::now_utc().unix_timestamp(),
            model: order.model.name.to_string(),
            endpoint,
            include_usage: asked.include_usage,
        };
        return stream::respond(front, order, (form, asked.n), place).await;
    }
    let mut job = AwaitedJob::publish(front, order).await?;
    let stored = job.stored().await?;
    if let Some(reference) = stored.reference()
        && let Some(line) = ClaimedLine::open(front, &stored, &reference).await?
    {
        return Ok(line.send(job, place));
    }
    let outcome = job.outcome().await?;
    let (status, body) = answer_of(&outcome)?;
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
    Ok((status, [(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// The headers of a request's job, and how long until its deadline, which is `limit` at most.
///
/// # Errors
/// [`ApiCode::InvalidParameter`], [`ApiCode::InsufficientPermissions`].
pub fn envelope(
    front: &Front,
    caller: &Caller,
    headers: &HeaderMap,
    limit: Span,
) -> Result<(JobEnvelope, Duration), ApiError> {
    let asked = text(headers, CLASS)?.map(str::parse::<Class>).transpose();
    let asked = asked.map_err(|error| ApiError::of(ApiCode::InvalidParameter, CLASS, error))?;
    let (envelope, time) = envelope_of(front, caller, (asked, text(headers, DEADLINE)?), limit)?;
    // Its standard says to pass over a wrong one.
    let traceparent = text(headers, "traceparent").ok().flatten().map(str::to_owned);
    Ok((JobEnvelope { traceparent, ..envelope }, time))
}

/// The same of a class and a deadline that came in another way.
///
/// # Errors
/// As [`envelope`].
pub fn envelope_of(
    front: &Front,
    caller: &Caller,
    (class, deadline): (Option<Class>, Option<&str>),
    limit: Span,
) -> Result<(JobEnvelope, Duration), ApiError> {
    let now = OffsetDateTime::now_utc();
    let time = time_of(deadline, now, limit)?;
    let envelope = JobEnvelope {
        class: caller.class(class, front.args.class)?,
        deadline: (now + time).format(&Rfc3339).ok(),
        ..JobEnvelope::default()
    };
    Ok((envelope, time))
}

/// How much time a request gives its job; never more than `limit`.
fn time_of(text: Option<&str>, now: OffsetDateTime, limit: Span) -> Result<Duration, ApiError> {
    let Some(text) = text else { return Ok(limit.0) };
    let refuse = |why: &str| {
        let shown: String = text.chars().take(80).collect();
        ApiError::of(ApiCode::InvalidParameter, DEADLINE, format_args!("{shown:?} {why}"))
    };
    let time = match (text.parse::<Span>(), OffsetDateTime::parse(text, &Rfc3339)) {
        (Ok(span), _) => span.0,
        (_, Ok(at)) => Duration::try_from(at - now).unwrap_or_default(),
        _ => return Err(refuse("is neither a span such as 90s nor an RFC 3339 time")),
    };
    if time.is_zero() || time > limit.0 {
        return Err(refuse(&format!("is not within the next {limit}")));
    }
    Ok(time)
}

/// A header's text.
///
/// # Errors
/// [`ApiCode::InvalidParameter`] where it is not visible ASCII.
pub fn text<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, ApiError> {
    let Some(value) = headers.get(name) else { return Ok(None) };
    value.to_str().map(Some).map_err(|_| {
        let shown: String = String::from_utf8_lossy(value.as_bytes()).chars().take(80).collect();
        ApiError::of(ApiCode::InvalidParameter, name, format_args!("{shown:?} is not visible ASCII"))
    })
}

/// A JSON body, whole.
///
/// # Errors
/// [`ApiCode::UnsupportedMediaType`], [`ApiCode::RequestTooLarge`], [`ApiCode::BodyTimeout`].
pub async fn read_json(front: &Front, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let media_type = text(headers, "content-type").ok().flatten().unwrap_or_default();
    let media_type = media_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if media_type != "application/json" {
        let message = format!("the content type is {media_type:?}; it must be application/json");
        return Err(ApiError::new(ApiCode::UnsupportedMediaType, message));
    }
    let limit = front.args.body_timeout;
    let collecting = collect(body, front.body_bytes_max(), front.memory.nothing());
    tokio::time::timeout(limit.0, collecting).await.unwrap_or_else(|_| {
        Err(ApiError::new(ApiCode::BodyTimeout, format!("the body did not come within {limit}")))
    })
}

/// The bytes of a body, which count as held from when they come until nobody has them any more.
async fn collect(body: Body, limit: usize, mut held: HeldMemory) -> Result<Bytes, ApiError> {
    // Of one that will be too large nothing is kept; it is read as far as its sender would not hear the answer else.
    let announced = body.size_hint().exact().and_then(|length| usize::try_from(length).ok()).unwrap_or(0);
    if announced > DISCARDED_BYTES_MAX {
        return Err(too_large(announced, limit));
    }
    let mut pieces = body.into_data_stream();
    let (mut whole, mut seen) = (Vec::new(), 0);
    while let Some(piece) = pieces.next().await {
        // Who left in the middle of a body reads no answer.
        let piece = piece.map_err(|_| ApiError::new(ApiCode::InvalidJson, "the body broke off"))?;
        seen += piece.len();
        if seen.max(announced) <= limit {
            if seen > whole.capacity() {
                let room = (2 * whole.capacity()).clamp(seen, limit.max(seen));
                held.grow(room - whole.capacity())?;
                whole.reserve_exact(room - whole.len());
            }
            whole.extend_from_slice(&piece);
        } else if seen > DISCARDED_BYTES_MAX {
            break;
        }
    }
    if seen > limit {
        return Err(too_large(seen.max(announced), limit));
    }
    Ok(held.with(whole))
}

fn too_large(bytes: usize, limit: usize) -> ApiError {
    let message = format!("the body has {bytes} bytes or more; {limit} are allowed");
    ApiError::new(ApiCode::RequestTooLarge, message)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;
    use crate::http::memory::MemoryBudget;

    fn refused(endpoint: Endpoint, body: &str) -> (ApiCode, Option<String>) {
        let error = Asked::read(Some(endpoint), body.as_bytes()).unwrap_err();
        (error.code, error.param)
    }

    #[test]
    fn what_is_read_of_a_body() {
        let body =
            r#"{"model":"a/b","messages":[],"stream":true,"stream_options":{"include_usage":true},"n":2}"#;
        let asked = Asked::read(Some(Endpoint::Chat), body.as_bytes()).unwrap();
        let expected = Asked { model: "a/b".into(), stream: true, include_usage: true, n: 2 };
        assert_eq!(asked, expected);
        // What a client sends for None is absent, and what only a worker can judge is left to it.
        let body = r#"{"model":"m","prompt":"x","stream":null,"stream_options":null,"n":null,"top_k":"?"}"#;
        let asked = Asked::read(Some(Endpoint::Completions), body.as_bytes()).unwrap();
        assert_eq!(asked, Asked { model: "m".into(), stream: false, include_usage: false, n: 1 });
    }

    #[test]
    fn refusals_name_the_field() {
        let named = |field: &str| Some(field.to_owned());
        let chat = |body| refused(Endpoint::Chat, body);
        for body in ["", "[1]", r#" ["m",null,null,null,[],null]"#, "{", "\"x\"", r#"{"n":1}{}"#] {
            assert_eq!(chat(body), (ApiCode::InvalidJson, None), "{body}");
        }
        assert_eq!(chat(r#"{"model":"m"}"#), (ApiCode::MissingParameter, named("messages")));
        assert_eq!(chat(r#"{"model":"m","messages":null}"#), (ApiCode::MissingParameter, named("messages")));
        assert_eq!(chat(r#"{"messages":[]}"#), (ApiCode::MissingParameter, named("model")));
        assert_eq!(chat(r#"{"messages":[],"model":3}"#), (ApiCode::InvalidParameter, named("model")));
        let text = r#"{"model":"m","messages":[],"stream":"yes"}"#;
        assert_eq!(chat(text), (ApiCode::InvalidParameter, named("stream")));
        let completion = refused(Endpoint::Completions, r#"{"model":"m","messages":[]}"#);
        assert_eq!(completion, (ApiCode::MissingParameter, named("prompt")));
    }

    #[test]
    fn a_deadline_lies_within_the_limit() {
        let now = OffsetDateTime::UNIX_EPOCH;
        let limit: Span = "10m".parse().unwrap();
        let time = |text| time_of(text, now, limit).map(|time| time.as_secs());
        assert_eq!(time(None), Ok(600));
        assert_eq!(time(Some("90s")), Ok(90));
        assert_eq!(time(Some("1970-01-01T00:01:00Z")), Ok(60));
        for wrong in ["tomorrow", "0s", "11m", "1969-12-31T23:59:59Z", "1970-01-01T01:00:00Z"] {
            let error = time(Some(wrong)).unwrap_err();
            assert!(error.message.contains(wrong) && error.param.as_deref() == Some(DEADLINE), "{error:?}");
        }
    }

    #[test]
    fn a_header_that_is_no_text_is_refused() {
        let mut headers = HeaderMap::new();
        assert_eq!(text(&headers, CLASS), Ok(None));
        headers.insert(CLASS, HeaderValue::from_static("high"));
        assert_eq!(text(&headers, CLASS), Ok(Some("high")));
        headers.insert(CLASS, HeaderValue::from_bytes("höher".as_bytes()).unwrap());
        let error = text(&headers, CLASS).unwrap_err();
        assert_eq!((error.code, error.param.as_deref()), (ApiCode::InvalidParameter, Some(CLASS)));
        assert!(error.message.contains("höher"), "{}", error.message);
    }

    #[tokio::test]
    async fn a_body_has_a_limit() {
        let memory = MemoryBudget::new(2 << 10);
        let error = collect(Body::from("12345"), 4, memory.nothing()).await.unwrap_err();
        assert_eq!(error.code, ApiCode::RequestTooLarge);
        assert!(error.message.contains("5 bytes") && error.message.contains("4 are"), "{}", error.message);
        let whole = collect(Body::from("1234"), 4, memory.nothing()).await.unwrap();
        assert_eq!((whole.as_ref(), memory.held()), (b"1234".as_slice(), 1 << 10));
        let refused = collect(Body::from(vec![7; 1500]), 5_000, memory.nothing()).await.unwrap_err();
        assert_eq!(refused.code, ApiCode::Overloaded, "beside the first there is no memory for it");
        drop(whole);
        assert_eq!(memory.held(), 0);
        let announced = Body::from(vec![0; DISCARDED_BYTES_MAX + 1]);
        let error = collect(announced, 4, memory.nothing()).await.unwrap_err();
        assert!(
            error.message.contains("67108865 bytes") && error.message.contains("4 are"),
            "{}",
            error.message
        );
    }
}
