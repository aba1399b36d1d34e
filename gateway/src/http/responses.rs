//! `/v1/responses`: a response is a job whose body is the chat that was asked for.
//!
//! Its id is `resp_` and the job's name, so that any gateway finds it; what was asked is kept in [`records`]. [`ask`]
//! reads a request, [`object`] and [`events`] are the two forms in which a client sees a response.

pub mod ask;
pub mod events;
pub mod items;
pub mod object;
pub mod records;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, Request, State};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use bytes::Bytes;
use millrace_crds::tokens::TokenDelta;
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::http::awaited::{AwaitedJob, JobOrder, answer_of};
use crate::http::caller::RequestContext;
use crate::http::claimed;
use crate::http::document;
use crate::http::error::{ApiCode, ApiError};
use crate::http::followed::{FollowWriter, FollowedJob};
use crate::http::front::Front;
use crate::http::inference::{envelope, read_json};
use crate::http::jobs::{self, JobName, TIME_MAX};
use crate::http::keys::Verb;
use crate::http::responses::ask::ResponseAsk;
use crate::http::responses::events::ResponseEvents;
use crate::http::responses::object::{ResponseState, object, text_of};
use crate::http::responses::records::ResponseRecord;
use crate::outcome::CollectedOutcome;
use crate::publish::JobEnvelope;

/// What ids begin with.
const PREFIX: &str = "resp_";
/// How long a cancelled response is waited for.
const CANCEL_PATIENCE: Duration = Duration::from_secs(2);

fn id_of(name: &JobName) -> String {
    format!("{PREFIX}{}", name.text())
}

fn missing() -> ApiError {
    ApiError::new(ApiCode::JobNotFound, "there is no such response, or it has expired")
}

/// The answer in an outcome, in the form of chats.
fn answer_in(outcome: &CollectedOutcome) -> Result<Value, ApiError> {
    let (_, body) = answer_of(outcome)?;
    let unreadable = |_| ApiError::new(ApiCode::OutcomeUnreadable, "the stored answer is no JSON");
    serde_json::from_slice(&body).map_err(unreadable)
}

/// Answers an input, whole, streamed or in the background
#[utoipa::path(post, path = "/v1/responses", tag = "Responses",
    request_body(content = ref("#/components/schemas/ResponseRequest"), content_type = "application/json"),
    params(document::AskHeaders),
    responses((status = 200, description = "The response, or its events where `stream` is true", content(
        (ref("#/components/schemas/Response") = "application/json"), (String = "text/event-stream")))))]
pub async fn create(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    request: Request,
) -> Result<Response, ApiError> {
    let caller = context.caller()?;
    caller.may(Verb::Infer)?;
    let place = front.admit()?;
    let (head, body) = request.into_parts();
    let ask = ResponseAsk::read(&read_json(&front, &head.headers, body).await?)?;
    let model = front.catalog.find(&ask.model, &caller.scopes).await?.model;
    let _ = context.model.set(model.clone());
    let before = conversation_of(&front, &context, ask.previous.as_deref()).await?;
    let limit = if ask.background { TIME_MAX } else { front.args.timeout };
    let (envelope, time) = envelope(&front, caller, &head.headers, limit)?;
    let order = JobOrder {
        id: jobs::id_of_request(&caller.tenant, &context.id),
        context: context.clone(),
        model,
        envelope: JobEnvelope { stream: ask.stream, ..envelope },
        body: ask.chat(&before),
        time,
        // An id must lead to a job of its own.
        cache: false,
    };
    let record = ResponseRecord {
        created: OffsetDateTime::now_utc().unix_timestamp(),
        model: ask.model,
        background: ask.background,
        store: ask.store,
        echo: ask.echo,
        own: ask.messages.len(),
        conversation: before.into_iter().chain(ask.messages).collect(),
    };
    if record.store {
        front.responses.put((&order.model, &order.id), &record, front.message_bytes_max()).await?;
    }
    let mut name = JobName { model: order.model.clone(), sequence: 0, job: order.id.clone() };
    if ask.stream {
        let mut job = forgotten(&front, &name, FollowedJob::publish(&front, order).await).await?;
        name.sequence = job.source.sequence();
        if record.background {
            job.let_go();
        }
        let refusable = !record.background;
        let writer = EventLines(ResponseEvents::new(id_of(&name), record, None));
        return job.respond(&front, writer, refusable, place).await;
    }
    let mut job = forgotten(&front, &name, AwaitedJob::publish(&front, order).await).await?;
    name.sequence = job.sequence;
    if record.background {
        job.let_go();
        return Ok(Json(object(&id_of(&name), &record, ResponseState::Queued)).into_response());
    }
    let answer = answer_in(&job.outcome().await?)?;
    Ok(Json(object(&id_of(&name), &record, ResponseState::Answered(&answer))).into_response())
}

/// A record of a job that was not published is removed.
async fn forgotten<T>(front: &Front, name: &JobName, published: Result<T, ApiError>) -> Result<T, ApiError> {
    // Where the broker does not answer it may have the job, and does not remove the record either.
    if let Err(error) = &published
        && error.code != ApiCode::BrokerUnavailable
        && let Err(error) = front.responses.remove(&name.model, &name.job).await
    {
        tracing::warn!(job = %name.job, error = %error.message, "the record of a refused response stays");
    }
    published
}

/// The conversation that a response continues: what was said before it, and its answer.
async fn conversation_of(
    front: &Arc<Front>,
    context: &RequestContext,
    previous: Option<&str>,
) -> Result<Vec<Value>, ApiError> {
    let Some(id) = previous else { return Ok(Vec::new()) };
    let named = |error: ApiError| match error.code {
        ApiCode::JobNotFound => ApiError::of(error.code, "previous_response_id", error.message),
        _ => error,
    };
    let unanswered = || {
        let message = "this response has no answer to continue; it has failed, or is not done yet";
        ApiError::of(ApiCode::InvalidParameter, "previous_response_id", message)
    };
    let (name, mut record) = found(front, context, id).await.map_err(named)?;
    let outcome = jobs::state_of(front, &name).await.map_err(named)?;
    let mut outcome = outcome.ok_or_else(unanswered)?;
    claimed::fetch(front, &mut outcome).await?;
    let answer = answer_in(&outcome).map_err(|_| unanswered())?;
    record.conversation.push(json!({"role": "assistant", "content": text_of(&answer)}));
    Ok(record.conversation)
}

/// The response that a path names, if it is of the caller's tenant and the caller may see its model.
async fn found(
    front: &Arc<Front>,
    context: &RequestContext,
    id: &str,
) -> Result<(JobName, ResponseRecord), ApiError> {
    let gone = |error: ApiError| if error.code == ApiCode::JobNotFound { missing() } else { error };
    let name = id.strip_prefix(PREFIX).ok_or_else(missing)?;
    let name = jobs::named(front, context, name, Verb::Infer).await.map_err(gone)?;
    let record = front.responses.get(&name.model, &name.job).await?.ok_or_else(missing)?;
    Ok((name, record))
}

/// The response as it is now.
async fn seen(front: &Front, name: &JobName, record: &ResponseRecord) -> Result<Value, ApiError> {
    let gone = |error: ApiError| if error.code == ApiCode::JobNotFound { missing() } else { error };
    let id = id_of(name);
    let Some(mut outcome) = jobs::state_of(front, name).await.map_err(gone)? else {
        return Ok(object(&id, record, ResponseState::Queued));
    };
    claimed::fetch(front, &mut outcome).await?;
    Ok(match answer_in(&outcome) {
        Ok(answer) => object(&id, record, ResponseState::Answered(&answer)),
        Err(error) if error.code == ApiCode::OutcomeUnreadable => return Err(error),
        Err(error) => object(&id, record, ResponseState::Failed(&error)),
    })
}

type QueryFields = Result<Query<HashMap<String, String>>, QueryRejection>;

fn fields_of(query: QueryFields) -> Result<HashMap<String, String>, ApiError> {
    let unreadable = |error: QueryRejection| ApiError::new(ApiCode::InvalidParameter, error.body_text());
    query.map(|Query(fields)| fields).map_err(unreadable)
}

/// Looks at a response, or streams the rest of it
///
/// With `stream=true` its events come, with `starting_after` those behind this number, from any gateway.
#[utoipa::path(get, path = "/v1/responses/{id}", tag = "Responses",
    params(("id" = String, Path, description = "The response's id"),
        ("stream" = Option<bool>, Query, description = "Whether to stream its events"),
        ("starting_after" = Option<u64>, Query, description = "The last event that the client has")),
    responses((status = 200, description = "The response, or its events", content(
        (ref("#/components/schemas/Response") = "application/json"), (String = "text/event-stream")))))]
pub async fn retrieve(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
    query: QueryFields,
) -> Result<Response, ApiError> {
    let place = front.admit()?;
    let (stream, after) = streamed(&fields_of(query)?)?;
    let (name, record) = found(&front, &context, &id).await?;
    if !stream {
        return Ok(Json(seen(&front, &name, &record).await?).into_response());
    }
    let job = FollowedJob::find(&front, name.clone()).await?;
    let writer = EventLines(ResponseEvents::new(id_of(&name), record, after));
    job.respond(&front, writer, false, place).await
}

/// Whether to stream, and behind which number.
fn streamed(fields: &HashMap<String, String>) -> Result<(bool, Option<u64>), ApiError> {
    let wrong = |name: &str, text: &str, expected: &str| {
        let shown: String = text.chars().take(80).collect();
        ApiError::of(ApiCode::InvalidParameter, name, format_args!("{shown:?} is not {expected}"))
    };
    let stream = match fields.get("stream").map(String::as_str) {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => return Err(wrong("stream", other, "true or false")),
    };
    let Some(text) = fields.get("starting_after") else { return Ok((stream, None)) };
    let after = text.parse().ok().filter(|after| *after < 1 << 53);
    let after = after.ok_or_else(|| wrong("starting_after", text, "the number of an event"))?;
    if !stream {
        return Err(wrong("starting_after", text, "allowed without stream=true"));
    }
    Ok((stream, Some(after)))
}

/// Asks for the end of a response
///
/// It is a wish: one that ended before stays as it is.
#[utoipa::path(post, path = "/v1/responses/{id}/cancel", tag = "Responses",
    params(("id" = String, Path, description = "The response's id")),
    responses((status = 200, description = "The response", body = ref("#/components/schemas/Response"))))]
pub async fn cancel(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let _place = front.admit()?;
    let (name, record) = found(&front, &context, &id).await?;
    let mut job = FollowedJob::find(&front, name.clone()).await?;
    if jobs::state_of(&front, &name).await?.is_none() {
        jobs::mark(&front, &name).await?;
        // A worker that has it hears of it at once.
        let _ = tokio::time::timeout(CANCEL_PATIENCE, job.source.outcome()).await;
    }
    Ok(Json(seen(&front, &name, &record).await?))
}

/// Forgets a response
///
/// Its job is cancelled if it still waits or runs; its outcome lives for as long as outcomes do.
#[utoipa::path(delete, path = "/v1/responses/{id}", tag = "Responses",
    params(("id" = String, Path, description = "The response's id")),
    responses((status = 200, description = "It is forgotten", body = ref("#/components/schemas/ResponseDeleted"))))]
pub async fn delete(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let _place = front.admit()?;
    let (name, _) = found(&front, &context, &id).await?;
    match jobs::state_of(&front, &name).await {
        Ok(None) => jobs::mark(&front, &name).await?,
        Err(error) if error.code != ApiCode::JobNotFound => return Err(error),
        _ => {}
    }
    front.responses.remove(&name.model, &name.job).await?;
    Ok(Json(json!({"id": id, "object": "response", "deleted": true})))
}

/// Lists the items of a response's input
#[utoipa::path(get, path = "/v1/responses/{id}/input_items", tag = "Responses",
    params(("id" = String, Path, description = "The response's id"),
        ("limit" = Option<u64>, Query, minimum = 1, maximum = 100, description = "Most items of a page; 20"),
        ("order" = Option<String>, Query, pattern = "^(asc|desc)$", description = "`desc`, or `asc`"),
        ("after" = Option<String>, Query, description = "The last item of the page before")),
    responses((status = 200, description = "A page", body = ref("#/components/schemas/ResponseItemList"))))]
pub async fn input_items(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
    query: QueryFields,
) -> Result<Json<Value>, ApiError> {
    let _place = front.admit()?;
    let page = items::ItemPage::read(&fields_of(query)?)?;
    let (name, record) = found(&front, &context, &id).await?;
    Ok(Json(page.of(name.job.as_str(), &record)?))
}

/// Events as the lines that clients read.
struct EventLines(ResponseEvents);

fn lines(event: &Value) -> Bytes {
    format!("event: {}\ndata: {event}\n\n", event["type"].as_str().unwrap_or_default()).into()
}

impl FollowWriter for EventLines {
    fn open(&mut self) -> Vec<Bytes> {
        self.0.open().iter().map(lines).collect()
    }

    fn take(&mut self, attempt: u64, delta: TokenDelta) -> Vec<Bytes> {
        self.0.take(attempt, delta).iter().map(lines).collect()
    }

    fn end(&mut self, outcome: Result<CollectedOutcome, ApiError>) -> (Vec<Bytes>, bool) {
        let answer = outcome.and_then(|outcome| answer_in(&outcome));
        match self.0.end(answer.as_ref()) {
            Ok(end) => (end.events.iter().map(lines).collect(), end.healed),
            Err(error) => (vec![lines(&self.0.error(&error))], false),
        }
    }
}
