//! `/v1/files` and `/v1/uploads`: content that goes through a gateway piece by piece, into the store and out of it.
//!
//! Before anything of a file is stored there is a record of it, so that what a gateway leaves behind that dies in the
//! middle is found and removed ([`sweep`]). A file that ended is not seen any more, whether or not it is removed
//! already.

pub mod form;
pub mod record;
pub mod sweep;
pub mod uploads;

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use serde_json::{Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::batches;
use crate::http::caller::{Caller, RequestContext};
use crate::http::error::{ApiCode, ApiError};
use crate::http::files::form::FormFields;
use crate::http::files::record::{FileRecord, PREFIX};
use crate::http::front::Front;
use crate::http::keys::Verb;
use crate::http::paging::PageQuery;
use crate::http::records::{RecordError, is_id, new_id, now, tenant_key};

/// Items of a page where nobody says otherwise, and at most: OpenAI's.
const PAGE_ITEMS: (usize, usize) = (10_000, 10_000);
/// Seconds in which content must be there; its record is removed after that.
const ARRIVAL_SECONDS: i64 = 3600;

/// The paths.
pub fn routes() -> OpenApiRouter<Arc<Front>> {
    OpenApiRouter::new()
        .routes(routes!(create, list))
        .routes(routes!(retrieve, remove))
        .routes(routes!(content))
        .merge(uploads::routes())
}

/// A caller who may use files.
///
/// # Errors
/// [`ApiCode::InsufficientPermissions`].
pub fn caller_of(context: &RequestContext) -> Result<&Caller, ApiError> {
    let caller = context.caller()?;
    caller.may(Verb::Files)?;
    Ok(caller)
}

/// The key of a tenant's record.
pub fn key_of(tenant: &str, id: &str) -> String {
    format!("{}.{id}", tenant_key(tenant))
}

/// A file of a tenant.
///
/// # Errors
/// [`ApiCode::FileNotFound`], [`ApiCode::BrokerUnavailable`].
pub async fn find(front: &Front, tenant: &str, id: &str) -> Result<FileRecord, ApiError> {
    let missing = || {
        let shown: String = id.chars().take(80).collect();
        ApiError::new(ApiCode::FileNotFound, format!("there is no file {shown:?}, or it has expired"))
    };
    if !is_id(PREFIX, id) {
        return Err(missing());
    }
    let found = front.archive.files.get(&key_of(tenant, id)).await?;
    found.map(|found| found.value).filter(|file| file.is_seen(now())).ok_or_else(missing)
}

/// A file that a batch reads: it stays until the batch has ended, even if its own end comes before.
///
/// # Errors
/// As [`find`].
pub async fn find_for_batch(front: &Front, tenant: &str, id: &str) -> Result<FileRecord, ApiError> {
    let found = front.archive.files.get(&key_of(tenant, id)).await?;
    let found = found.map(|found| found.value).filter(|file| file.complete);
    found.ok_or_else(|| ApiError::new(ApiCode::FileNotFound, format!("the file {id} is gone")))
}

/// Upload a file
#[utoipa::path(post, path = "/v1/files", tag = "Files",
    request_body(content = ref("#/components/schemas/FileForm"), content_type = "multipart/form-data"),
    responses((status = 200, description = "The file", body = ref("#/components/schemas/File"))))]
async fn create(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let caller = caller_of(&context)?;
    let _place = front.admit()?;
    let _transfer = front.archive.transfer().await?;
    let id = new_id(PREFIX);
    let key = key_of(&caller.tenant, &id);
    let blob = front.archive.blobs.empty(&id);
    let mut file = FileRecord {
        id,
        filename: String::new(),
        purpose: String::new(),
        created_at: now(),
        expires_at: Some(now() + ARRIVAL_SECONDS),
        complete: false,
        blobs: vec![blob.clone()],
    };
    let revision = front.archive.files.create(&key, &file).await?;
    let made = async {
        let (fields, content) = form::receive(&front, request, "file", &file.id).await?;
        complete(&mut file, &fields)?;
        file.filename = record::filename(content.filename.as_deref().unwrap_or("upload"))?;
        file.blobs = vec![content.blob];
        front.archive.files.update(&key, &file, revision).await.map_err(|error| match error {
            // It took so long that its record was removed.
            RecordError::Conflict => ApiError::new(ApiCode::BodyTimeout, "the file did not come in time"),
            other => other.into(),
        })
    };
    match made.await {
        Ok(_) => Ok(Json(file.object())),
        Err(error) => {
            front.archive.forget(&[blob]).await;
            // Where the broker is away now, what is left is removed later.
            let _ = front.archive.files.remove(&key).await;
            Err(error)
        }
    }
}

fn complete(file: &mut FileRecord, fields: &FormFields) -> Result<(), ApiError> {
    let text = fields.get("purpose");
    let text = text.ok_or_else(|| ApiError::of(ApiCode::MissingParameter, "purpose", "missing"))?;
    file.purpose = record::purpose(text)?;
    let seconds = fields.get("expires_after[seconds]").map(|text| text.trim().parse::<i64>()).transpose();
    let seconds = seconds.map_err(|_| {
        ApiError::of(ApiCode::InvalidParameter, "expires_after.seconds", "it is not a whole number")
    })?;
    let life = record::life("expires_after", fields.get("expires_after[anchor]"), seconds)?;
    file.expires_at = record::end(&file.purpose, life, file.created_at);
    file.complete = true;
    Ok(())
}

/// The files
#[utoipa::path(get, path = "/v1/files", tag = "Files",
    params(("limit" = Option<u32>, Query, description = "Most items"),
        ("after" = Option<String>, Query, description = "The last id of the page before"),
        ("order" = Option<String>, Query, description = "asc or desc"),
        ("purpose" = Option<String>, Query, description = "Only those")),
    responses((status = 200, description = "A page of them", body = ref("#/components/schemas/FileList"))))]
async fn list(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Query(query): Query<PageQuery>,
) -> Result<Json<Value>, ApiError> {
    let caller = caller_of(&context)?;
    let _place = front.admit()?;
    let (mut files, now) = (Vec::new(), now());
    let wanted = |file: &FileRecord| query.purpose.as_ref().is_none_or(|purpose| *purpose == file.purpose);
    let each = |_: &str, found: crate::http::records::Revised<FileRecord>| {
        if found.value.is_seen(now) && wanted(&found.value) {
            files.push((found.value.id.clone(), found.value));
        }
    };
    front.archive.files.each(Some(&tenant_key(&caller.tenant)), each).await?;
    Ok(Json(query.page(files, PAGE_ITEMS)?.object(|file| file.object())))
}

/// A file
#[utoipa::path(get, path = "/v1/files/{id}", tag = "Files",
    params(("id" = String, Path, description = "The file's id")),
    responses((status = 200, description = "The file", body = ref("#/components/schemas/File"))))]
async fn retrieve(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let caller = caller_of(&context)?;
    let _place = front.admit()?;
    Ok(Json(find(&front, &caller.tenant, &id).await?.object()))
}

/// The content of a file
#[utoipa::path(get, path = "/v1/files/{id}/content", tag = "Files",
    params(("id" = String, Path, description = "The file's id")),
    responses((status = 200, description = "Its bytes", content_type = "application/octet-stream")))]
async fn content(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let caller = caller_of(&context)?;
    let place = front.admit()?;
    let file = find(&front, &caller.tenant, &id).await?;
    let pieces = front.archive.blobs.read(&file.blobs);
    // The request runs until its content is sent.
    let pieces = futures::StreamExt::map(pieces, move |piece| {
        let _place = &place;
        piece.inspect_err(|error| tracing::warn!(%error, "the content of a file broke off"))
    });
    let mut response = Body::from_stream(pieces).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(file.bytes()));
    // RFC 6266: a name that is no plain text goes without.
    let plain = file.filename.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'"' && b != b'\\');
    let name =
        if plain { format!("attachment; filename=\"{}\"", file.filename) } else { "attachment".into() };
    if let Ok(value) = HeaderValue::from_str(&name) {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    Ok(response)
}

/// Delete a file
#[utoipa::path(delete, path = "/v1/files/{id}", tag = "Files",
    params(("id" = String, Path, description = "The file's id")),
    responses((status = 200, description = "It is deleted", body = ref("#/components/schemas/FileDeleted"))))]
async fn remove(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let caller = caller_of(&context)?;
    let _place = front.admit()?;
    let file = find(&front, &caller.tenant, &id).await?;
    if batches::inputs(&front).await?.contains(&file.id) {
        let message = format!("a batch that has not ended reads {id}; cancel it first");
        return Err(ApiError::new(ApiCode::FileInUse, message));
    }
    // Without its record nobody finds the content; with it, what is left of the content is removed later.
    front.archive.forget(&file.blobs).await;
    front.archive.files.remove(&key_of(&caller.tenant, &id)).await?;
    Ok(Json(json!({"id": id, "object": "file", "deleted": true})))
}
