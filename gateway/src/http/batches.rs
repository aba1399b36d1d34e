//! `/v1/batches`: the lines of a file become jobs, and their outcomes files, whatever becomes of the gateways.
//!
//! [`record`] is a batch and what may become of it; [`keeper`] decides which gateway runs it, which is then [`held`];
//! [`run`] reads its [`input`] of [`lines`], has them in [`flight`] and makes [`result`] lines of their outcomes;
//! [`finish`] makes the files, and [`webhook`] tells of the end.

pub mod finish;
pub mod flight;
pub mod held;
pub mod input;
pub mod keeper;
pub mod lines;
pub mod record;
pub mod result;
pub mod run;
pub mod webhook;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, Query, Request, State};
use axum::{Extension, Json};
use millrace_crds::names::Class;
use millrace_crds::units::Span;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::batches::lines::ENDPOINTS;
use crate::http::batches::record::{ActiveBatch, BatchRecord, BatchStatus, PREFIX, WebhookTarget};
use crate::http::caller::{Caller, RequestContext};
use crate::http::error::{ApiCode, ApiError};
use crate::http::files;
use crate::http::files::key_of;
use crate::http::files::record::life;
use crate::http::front::Front;
use crate::http::inference::{read_json, text};
use crate::http::keys::Verb;
use crate::http::paging::PageQuery;
use crate::http::records::{RecordError, Revised, is_id, new_id, now, tenant_key};

/// Items of a page where nobody says otherwise, and at most: OpenAI's.
const PAGE_ITEMS: (usize, usize) = (20, 100);
/// How long a batch may take at least and at most.
const WINDOW: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(7 * 24 * 3600));
/// The client's own: pairs, and bytes of their names and values, as OpenAI's.
const METADATA_PAIRS_MAX: usize = 16;
const METADATA_NAME_MAX: usize = 64;
const METADATA_VALUE_MAX: usize = 512;
/// The request header with the class of a batch's jobs.
const CLASS: &str = "millrace-class";
/// Most times that a write is tried again because another one came between.
const TRIES_MAX: usize = 64;

/// The paths.
pub fn routes() -> OpenApiRouter<Arc<Front>> {
    OpenApiRouter::new().routes(routes!(create, list)).routes(routes!(retrieve)).routes(routes!(cancel))
}

/// The ids of the files that batches read which have not ended.
///
/// # Errors
/// [`RecordError::Away`].
pub async fn inputs(front: &Front) -> Result<HashSet<String>, RecordError> {
    let mut ids = HashSet::new();
    let each = |_: &str, batch: Revised<ActiveBatch>| {
        ids.insert(batch.value.input_file_id);
    };
    front.archive.active.each(None, each).await?;
    Ok(ids)
}

#[derive(Debug, Deserialize)]
struct Life {
    anchor: Option<String>,
    seconds: Option<i64>,
}

#[derive(Debug, Deserialize)]
struct Hook {
    url: Option<String>,
    secret: Option<String>,
}

/// A request as it is sent; `null` is absent.
#[derive(Debug, Deserialize)]
struct CreateBody {
    input_file_id: Option<String>,
    endpoint: Option<String>,
    completion_window: Option<String>,
    metadata: Option<Map<String, Value>>,
    output_expires_after: Option<Life>,
    webhook: Option<Hook>,
}

fn required(field: &str, value: Option<String>) -> Result<String, ApiError> {
    value.ok_or_else(|| ApiError::of(ApiCode::MissingParameter, field, "missing"))
}

fn wrong(field: &str, value: &str, why: impl std::fmt::Display) -> ApiError {
    let shown: String = value.chars().take(80).collect();
    ApiError::of(ApiCode::InvalidParameter, field, format_args!("{shown:?} {why}"))
}

impl CreateBody {
    fn read(body: &[u8]) -> Result<Self, ApiError> {
        let invalid = |reason: String| {
            ApiError::new(ApiCode::InvalidJson, format!("the body is not as it must be: {reason}"))
        };
        // An array would be taken for the fields in their order.
        if body.trim_ascii_start().first() != Some(&b'{') {
            return Err(invalid("it is no JSON object".into()));
        }
        serde_json::from_slice(body).map_err(|error| invalid(error.to_string()))
    }

    /// The batch that is asked for.
    fn record(self, caller: &Caller, class: Class, private: bool) -> Result<BatchRecord, ApiError> {
        let endpoint = required("endpoint", self.endpoint)?;
        if !ENDPOINTS.contains(&endpoint.as_str()) {
            return Err(wrong("endpoint", &endpoint, format!("is not one of {}", ENDPOINTS.join(", "))));
        }
        let completion_window = required("completion_window", self.completion_window)?;
        let window = window(&completion_window)?;
        let output_life = match self.output_expires_after {
            None => None,
            Some(l) => life("output_expires_after", l.anchor.as_deref(), l.seconds)?,
        };
        let created_at = now();
        Ok(BatchRecord {
            id: new_id(PREFIX),
            tenant: caller.tenant.clone(),
            endpoint,
            input_file_id: required("input_file_id", self.input_file_id)?,
            completion_window,
            metadata: self.metadata.map(metadata).transpose()?,
            output_life,
            class,
            scopes: caller.scopes.clone(),
            webhook: self.webhook.map(|hook| target(hook, private)).transpose()?,
            created_at,
            expires_at: created_at + window.as_secs() as i64,
            status: BatchStatus::Validating,
            times: Default::default(),
            model: None,
            queue: None,
            errors: Vec::new(),
            counts: Default::default(),
            written: 0,
            answered: 0,
            tokens: Default::default(),
            output: Vec::new(),
            error_output: Vec::new(),
            output_file_id: None,
            error_file_id: None,
            late: false,
            claim: None,
        })
    }
}

/// `24h`, or another span.
fn window(text: &str) -> Result<Duration, ApiError> {
    let span =
        text.parse::<Span>().map_err(|_| wrong("completion_window", text, "is no span such as 24h"))?;
    let (least, most) = WINDOW;
    if span.0 < least || span.0 > most {
        let why = format!("is not within {} to {}", Span(least), Span(most));
        return Err(wrong("completion_window", text, why));
    }
    Ok(span.0)
}

fn metadata(pairs: Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    let refuse = |why: String| ApiError::of(ApiCode::InvalidParameter, "metadata", why);
    if pairs.len() > METADATA_PAIRS_MAX {
        return Err(refuse(format!("it has {} pairs; {METADATA_PAIRS_MAX} are allowed", pairs.len())));
    }
    for (name, value) in &pairs {
        let text = value.as_str().filter(|text| text.chars().count() <= METADATA_VALUE_MAX);
        if name.chars().count() > METADATA_NAME_MAX || text.is_none() {
            let name: String = name.chars().take(80).collect();
            return Err(refuse(format!(
                "{name:?}: a name has at most {METADATA_NAME_MAX} characters, a value is a text of at most \
                 {METADATA_VALUE_MAX}"
            )));
        }
    }
    Ok(pairs)
}

fn target(hook: Hook, private: bool) -> Result<WebhookTarget, ApiError> {
    let (url, secret) = (required("webhook.url", hook.url)?, required("webhook.secret", hook.secret)?);
    webhook::check(&url, &secret, private)
        .map_err(|(field, reason)| ApiError::of(ApiCode::InvalidParameter, field, reason))?;
    Ok(WebhookTarget { url, secret, tries: 0, due_at: None })
}

fn caller_of(context: &RequestContext) -> Result<&Caller, ApiError> {
    let caller = context.caller()?;
    caller.may(Verb::Batches)?;
    Ok(caller)
}

/// Run the lines of a file
#[utoipa::path(post, path = "/v1/batches", tag = "Batches",
    request_body(content = ref("#/components/schemas/BatchRequest"), content_type = "application/json"),
    responses((status = 200, description = "The batch", body = ref("#/components/schemas/Batch"))))]
async fn create(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let caller = caller_of(&context)?;
    let _place = front.admit()?;
    let (head, body) = request.into_parts();
    let class = text(&head.headers, CLASS)?.map(str::parse::<Class>).transpose();
    let class = class.map_err(|error| ApiError::of(ApiCode::InvalidParameter, CLASS, error))?;
    let class = caller.class(class, Class::Low)?;
    let body = read_json(&front, &head.headers, body).await?;
    let record = CreateBody::read(&body)?.record(caller, class, front.args.files.webhook_private)?;
    let file = files::find(&front, &caller.tenant, &record.input_file_id)
        .await
        .map_err(|error| ApiError { param: Some("input_file_id".into()), ..error })?;
    if file.purpose != "batch" {
        let why = format!("is for {:?}; a batch reads files for \"batch\"", file.purpose);
        return Err(wrong("input_file_id", &file.id, why));
    }
    let key = key_of(&caller.tenant, &record.id);
    let active = ActiveBatch { key: key.clone(), input_file_id: file.id, created_at: record.created_at };
    // In this order, so that no batch is ever forgotten.
    front.archive.active.create(&record.id, &active).await?;
    front.archive.batches.create(&key, &record).await?;
    front.archive.made.notify_one();
    Ok(Json(record.object()))
}

/// The batches
#[utoipa::path(get, path = "/v1/batches", tag = "Batches",
    params(("limit" = Option<u32>, Query, description = "Most items"),
        ("after" = Option<String>, Query, description = "The last id of the page before"),
        ("order" = Option<String>, Query, description = "asc or desc")),
    responses((status = 200, description = "A page of them", body = ref("#/components/schemas/BatchList"))))]
async fn list(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Query(query): Query<PageQuery>,
) -> Result<Json<Value>, ApiError> {
    let caller = caller_of(&context)?;
    let _place = front.admit()?;
    let mut batches = Vec::new();
    let each =
        |_: &str, found: Revised<BatchRecord>| batches.push((found.value.id.clone(), found.value.object()));
    front.archive.batches.each(Some(&tenant_key(&caller.tenant)), each).await?;
    Ok(Json(query.page(batches, PAGE_ITEMS)?.object(|object| object)))
}

async fn find(front: &Front, tenant: &str, id: &str) -> Result<(String, Revised<BatchRecord>), ApiError> {
    let missing = || ApiError::new(ApiCode::BatchNotFound, "there is no such batch");
    if !is_id(PREFIX, id) {
        return Err(missing());
    }
    let key = key_of(tenant, id);
    let found = front.archive.batches.get(&key).await?.ok_or_else(missing)?;
    Ok((key, found))
}

/// A batch
#[utoipa::path(get, path = "/v1/batches/{id}", tag = "Batches",
    params(("id" = String, Path, description = "The batch's id")),
    responses((status = 200, description = "The batch", body = ref("#/components/schemas/Batch"))))]
async fn retrieve(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let caller = caller_of(&context)?;
    let _place = front.admit()?;
    Ok(Json(find(&front, &caller.tenant, &id).await?.1.value.object()))
}

/// Cancel a batch
#[utoipa::path(post, path = "/v1/batches/{id}/cancel", tag = "Batches",
    params(("id" = String, Path, description = "The batch's id")),
    responses((status = 200, description = "The batch", body = ref("#/components/schemas/Batch"))))]
async fn cancel(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let caller = caller_of(&context)?;
    let _place = front.admit()?;
    for _ in 0..TRIES_MAX {
        let (key, Revised { mut value, revision }) = find(&front, &caller.tenant, &id).await?;
        let before = value.status;
        if !value.cancel(now()) {
            let message = format!("the batch is {before:?} and cannot be cancelled").to_lowercase();
            return Err(ApiError::new(ApiCode::InvalidState, message));
        }
        if value.status == before {
            return Ok(Json(value.object()));
        }
        match front.archive.batches.update(&key, &value, revision).await {
            Ok(_) => return Ok(Json(value.object())),
            Err(RecordError::Conflict) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(ApiError::new(ApiCode::Overloaded, "too many requests change this batch"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<BatchRecord, Option<String>> {
        let body = CreateBody::read(body.as_bytes()).map_err(|error| error.param)?;
        body.record(&Caller::default(), Class::Low, false).map_err(|error| error.param)
    }

    const GOOD: &str = r#"{"input_file_id":"f","endpoint":"/v1/completions","completion_window":"24h"}"#;

    #[test]
    fn a_request_is_read() {
        let record = read(&GOOD.replace('}', r#","metadata":{"a":"b"},"webhook":null}"#)).unwrap();
        assert_eq!(record.expires_at - record.created_at, 24 * 3600);
        let object = record.object();
        // Every field of OpenAI's object is there, whether or not it has a value.
        for field in [
            "id",
            "object",
            "endpoint",
            "errors",
            "input_file_id",
            "completion_window",
            "status",
            "output_file_id",
            "error_file_id",
            "created_at",
            "in_progress_at",
            "expires_at",
            "finalizing_at",
            "completed_at",
            "failed_at",
            "expired_at",
            "cancelling_at",
            "cancelled_at",
            "request_counts",
            "metadata",
            "model",
            "usage",
        ] {
            assert!(object.get(field).is_some(), "{field}");
        }
        assert_eq!(object["metadata"]["a"], "b");
        assert!(read(&GOOD.replace("24h", "90m")).is_ok());
    }

    #[test]
    fn refusals_name_the_field() {
        let with = |more: &str| GOOD.replace('}', &format!(",{more}}}"));
        for (body, param) in [
            (GOOD.replace("24h", "30s"), "completion_window"),
            (GOOD.replace("24h", "8000h"), "completion_window"),
            (GOOD.replace("24h", "soon"), "completion_window"),
            (GOOD.replace("/v1/completions", "/v1/embeddings"), "endpoint"),
            (GOOD.replace("input_file_id", "file"), "input_file_id"),
            (with(r#""metadata":{"a":1}"#), "metadata"),
            (
                with(r#""output_expires_after":{"anchor":"created_at","seconds":1}"#),
                "output_expires_after.seconds",
            ),
            (with(r#""webhook":{"url":"https://10.0.0.1/"}"#), "webhook.secret"),
            (
                with(
                    r#""webhook":{"url":"https://10.0.0.1/","secret":"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}"#,
                ),
                "webhook.url",
            ),
        ] {
            assert_eq!(read(&body), Err(Some(param.to_owned())), "{body}");
        }
        assert_eq!(read("[]"), Err(None));
    }
}
