//! Jobs that were given up, and their second chance: `/v1/jobs/dead` and `/v1/jobs/{id}/requeue`.
//!
//! A key with the verb `dead` sees the letters of its own tenant's jobs; with `admin` those of everybody, also of jobs
//! that came into the queue in another way.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use millrace_crds::job::header;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::connect::Connection;
use crate::dead;
use crate::failure::Failure;
use crate::http::caller::{Caller, RequestContext};
use crate::http::error::{ApiCode, ApiError};
use crate::http::front::Front;
use crate::http::jobs::{self, JobName, JobObject};
use crate::http::keys::Verb;

/// Letters of a page where the client does not say.
const LIMIT: usize = 20;
/// Most letters of a page.
const LIMIT_MAX: usize = 100;
/// Listings at once: each holds what one read of the broker brings, 32 MiB at most.
static LISTINGS: Semaphore = Semaphore::const_new(2);
/// Most reads of one listing; those of other tenants lie in between.
const READS_MAX: usize = 64;

fn unavailable(failure: &Failure) -> ApiError {
    tracing::warn!(%failure, "dead letters");
    ApiError::new(ApiCode::BrokerUnavailable, "the broker does not answer")
}

fn missing() -> ApiError {
    ApiError::new(ApiCode::JobNotFound, "there is no dead letter of such a job")
}

/// Which letters.
struct LetterPage {
    model: String,
    limit: usize,
    after: u64,
}

impl LetterPage {
    fn read(query: Result<Query<HashMap<String, String>>, QueryRejection>) -> Result<Self, ApiError> {
        let unreadable = |error: QueryRejection| ApiError::new(ApiCode::InvalidParameter, error.body_text());
        let Query(fields) = query.map_err(unreadable)?;
        let number = |name: &str, default: u64| match fields.get(name) {
            None => Ok(default),
            Some(text) => text.parse::<u64>().map_err(|_| {
                let shown: String = text.chars().take(80).collect();
                ApiError::of(ApiCode::InvalidParameter, name, format_args!("{shown:?} is no number"))
            }),
        };
        let limit = number("limit", LIMIT as u64)?;
        if !(1..=LIMIT_MAX as u64).contains(&limit) {
            let message = format!("{limit} is not 1 to {LIMIT_MAX}");
            return Err(ApiError::of(ApiCode::InvalidParameter, "limit", message));
        }
        let model = fields.get("model").cloned();
        let model = model.ok_or_else(|| ApiError::of(ApiCode::MissingParameter, "model", "missing"))?;
        Ok(Self { model, limit: limit as usize, after: number("after", 0)? })
    }
}

/// Lists jobs that were given up
#[utoipa::path(get, path = "/v1/jobs/dead", tag = "Jobs",
    params(("model" = String, Query, description = "The model's name"),
        ("limit" = Option<u64>, Query, minimum = 1, maximum = 100, description = "Most letters of a page; 20"),
        ("after" = Option<u64>, Query, minimum = 0, description = "The `number` of the last one of the page before")),
    responses((status = 200, description = "A page", body = ref("#/components/schemas/DeadLetterList"))))]
pub async fn list(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    query: Result<Query<HashMap<String, String>>, QueryRejection>,
) -> Result<Json<Value>, ApiError> {
    let caller = context.caller()?;
    caller.may(Verb::Dead)?;
    let _place = front.admit()?;
    let page = LetterPage::read(query)?;
    let model = front.catalog.find(&page.model, &caller.scopes).await?.model;
    let _ = context.model.set(model.clone());
    let _listing = LISTINGS.try_acquire().map_err(|_| {
        ApiError::new(ApiCode::Overloaded, "this gateway lists dead letters for others at the moment")
    })?;
    let (data, has_more) = letters(&front, caller, &front.connection(&model), &page).await?;
    let number = |letter: Option<&Value>| letter.map_or(Value::Null, |letter| letter["number"].clone());
    let (first, last) = (number(data.first()), number(data.last()));
    Ok(Json(json!({"object": "list", "data": data, "first": first, "last": last, "has_more": has_more})))
}

/// A page of the letters that a caller may see, and whether there are more.
async fn letters(
    front: &Front,
    caller: &Caller,
    broker: &Connection,
    page: &LetterPage,
) -> Result<(Vec<Value>, bool), ApiError> {
    let (all, prefix) = (caller.scopes.allow_verb(Verb::Admin), jobs::prefix_of(&caller.tenant));
    let stream = broker.model.dead_stream();
    let (mut data, mut sequence) = (Vec::new(), page.after.saturating_add(1));
    for _ in 0..READS_MAX {
        let read = dead::letters_from(broker, &stream, sequence).await.map_err(|e| unavailable(&e))?;
        let Some((_, last)) = read.last() else { return Ok((data, false)) };
        sequence = last.sequence + 1;
        for (job, message) in read.into_iter().filter(|(job, _)| all || job.as_str().starts_with(&prefix)) {
            if data.len() == page.limit {
                return Ok((data, true));
            }
            let id = JobName { model: broker.model.clone(), sequence: 0, job: job.clone() }.text();
            let letter = dead::letter(job, &message);
            data.push(json!({
                "id": id, "object": "job.dead", "number": message.sequence, "model": front.catalog.id_of(&broker.model),
                "reason": letter.reason, "class": letter.class, "attempt": letter.attempt, "worker": letter.worker,
                "time": letter.time, "bytes": letter.bytes,
            }));
        }
    }
    Ok((data, true))
}

/// Publishes a job that was given up again
///
/// It runs under an id of its own; its letter is removed.
#[utoipa::path(post, path = "/v1/jobs/{id}/requeue", tag = "Jobs",
    params(("id" = String, Path, description = "The dead job's id")),
    responses((status = 202, description = "The new job", body = ref("#/components/schemas/Job"))))]
pub async fn requeue(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<JobObject>), ApiError> {
    let caller = context.caller()?;
    caller.may(Verb::Dead)?;
    let _place = front.admit()?;
    let name = match caller.scopes.allow_verb(Verb::Admin) {
        false => jobs::named(&front, &context, &id, Verb::Dead).await?,
        true => {
            let name = JobName::parse(&id).ok_or_else(missing)?;
            front.catalog.find(&name.model.to_string(), &caller.scopes).await.map_err(|error| match error
                .code
            {
                ApiCode::ModelNotFound => missing(),
                _ => error,
            })?;
            let _ = context.model.set(name.model.clone());
            name
        }
    };
    let (broker, stream) = (front.connection(&name.model), name.model.dead_stream());
    let found = dead::find(&broker, &stream, &name.job).await.map_err(|e| unavailable(&e))?;
    let message = found.ok_or_else(missing)?;
    if message.headers.get(header::BODY_DROPPED).is_some() {
        let message = "the job's body did not fit into its letter; submit it anew";
        return Err(ApiError::new(ApiCode::RequestTooLarge, message));
    }
    front.room.check(&name.model, dead::letter(name.job.clone(), &message).class)?;
    let again =
        dead::publish_again(&broker, &stream, &name.job, message).await.map_err(|e| unavailable(&e))?;
    let new = JobName { sequence: again.sequence.unwrap_or(0), job: again.job, ..name };
    let outcome = match again.sequence {
        Some(_) => None,
        None => jobs::stored(&front, &new).await?,
    };
    Ok((StatusCode::ACCEPTED, Json(jobs::object(&front, &new, outcome.as_ref())?)))
}
