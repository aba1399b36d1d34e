//! `/v1/uploads`: a file in parts, which become its content without being copied.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::{Extension, Json};
use futures::TryStreamExt;
use hex::ToHex;
use md5::{Digest, Md5};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::http::blobs::Blob;
use crate::http::caller::RequestContext;
use crate::http::error::{ApiCode, ApiError};
use crate::http::files::record::{self, FileRecord};
use crate::http::files::{caller_of, form, key_of};
use crate::http::front::Front;
use crate::http::inference::read_json;
use crate::http::records::{RecordError, Revised, is_id, new_id, now};

/// What ids begin with.
const PREFIX: &str = "upload_";
const PART_PREFIX: &str = "part_";
/// Seconds that an upload may take, as OpenAI's.
const LIFE_SECONDS: i64 = 3600;
/// Most parts of an upload.
const PARTS_MAX: usize = 1024;
/// Most times that a write is tried again because another one came between.
const TRIES_MAX: usize = 64;

/// The paths.
pub fn routes() -> OpenApiRouter<Arc<Front>> {
    OpenApiRouter::new()
        .routes(routes!(create))
        .routes(routes!(add_part))
        .routes(routes!(complete))
        .routes(routes!(cancel))
}

/// How an upload stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UploadStatus {
    /// It takes parts.
    Pending,
    /// It is a file.
    Completed,
    /// It was cancelled.
    Cancelled,
    /// Its time was over.
    Expired,
}

/// A part of an upload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadPart {
    /// Its id, which is its content's name.
    pub id: String,
    /// Whether all of it is there.
    pub complete: bool,
    /// Its content.
    pub blob: Blob,
}

/// An upload as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadRecord {
    /// Its id.
    pub id: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// The file's name.
    pub filename: String,
    /// The file's media type, as the client says it.
    pub mime_type: String,
    /// What the file is for.
    pub purpose: String,
    /// Seconds that the file lives, if the client says so.
    pub life: Option<i64>,
    /// When it was made, in Unix seconds.
    pub created_at: i64,
    /// When it ends.
    pub expires_at: i64,
    /// How it stands.
    pub status: UploadStatus,
    /// Its parts, in the order in which they came.
    pub parts: Vec<UploadPart>,
    /// The file that it became.
    pub file: Option<FileRecord>,
}

impl UploadRecord {
    fn status_at(&self, now: i64) -> UploadStatus {
        let over = self.status == UploadStatus::Pending && self.expires_at <= now;
        if over { UploadStatus::Expired } else { self.status }
    }

    fn object(&self) -> Value {
        json!({
            "id": self.id, "object": "upload", "bytes": self.bytes, "created_at": self.created_at,
            "expires_at": self.expires_at, "filename": self.filename, "purpose": self.purpose,
            "mime_type": self.mime_type, "status": self.status_at(now()),
            "file": self.file.as_ref().map(FileRecord::object),
        })
    }

    /// Refuses what an upload takes only while it is pending.
    fn pending(&self) -> Result<(), ApiError> {
        match self.status_at(now()) {
            UploadStatus::Pending => Ok(()),
            status => {
                let message = format!("upload {} is {status:?}", self.id).to_lowercase();
                Err(ApiError::new(ApiCode::InvalidState, message))
            }
        }
    }

    /// The content of the file that these parts make.
    fn assembled(&self, part_ids: &[String]) -> Result<Vec<Blob>, ApiError> {
        let refuse = |why: String| ApiError::of(ApiCode::InvalidParameter, "part_ids", why);
        let mut blobs: Vec<Blob> = Vec::with_capacity(part_ids.len());
        for id in part_ids {
            let part = self.parts.iter().find(|part| part.id == *id && part.complete);
            let shown: String = id.chars().take(80).collect();
            let part = part.ok_or_else(|| refuse(format!("the upload has no part {shown:?}")))?;
            if blobs.contains(&part.blob) {
                return Err(refuse(format!("{shown:?} stands there twice")));
            }
            blobs.push(part.blob.clone());
        }
        let bytes: u64 = blobs.iter().map(|blob| blob.bytes).sum();
        if bytes != self.bytes {
            return Err(refuse(format!("these parts have {bytes} bytes; the upload has {}", self.bytes)));
        }
        Ok(blobs)
    }
}

async fn find(front: &Front, key: &str, id: &str) -> Result<Revised<UploadRecord>, ApiError> {
    let missing = || ApiError::new(ApiCode::UploadNotFound, "there is no such upload");
    if !is_id(PREFIX, id) {
        return Err(missing());
    }
    front.archive.uploads.get(key).await?.ok_or_else(missing)
}

/// Writes what `change` makes of an upload, however many others write to it.
async fn change(
    front: &Front,
    (key, id): (&str, &str),
    change: impl Fn(&mut UploadRecord) -> Result<(), ApiError>,
) -> Result<UploadRecord, ApiError> {
    for _ in 0..TRIES_MAX {
        let Revised { mut value, revision } = find(front, key, id).await?;
        change(&mut value)?;
        match front.archive.uploads.update(key, &value, revision).await {
            Ok(_) => return Ok(value),
            Err(RecordError::Conflict) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(ApiError::new(ApiCode::Overloaded, "too many requests change this upload"))
}

#[derive(Debug, Deserialize)]
struct ExpiresAfter {
    anchor: Option<String>,
    seconds: Option<i64>,
}

#[derive(Debug, Deserialize)]
struct CreateBody {
    bytes: Option<u64>,
    filename: Option<String>,
    mime_type: Option<String>,
    purpose: Option<String>,
    expires_after: Option<ExpiresAfter>,
}

fn read<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    // An array would be taken for the fields in their order.
    let object = body.trim_ascii_start().first() != Some(&b'[');
    let read =
        if object { serde_json::from_slice(body).map_err(|e| e.to_string()) } else { Err("an array".into()) };
    read.map_err(|reason| {
        ApiError::new(ApiCode::InvalidJson, format!("the body is not as it must be: {reason}"))
    })
}

fn required<T>(field: &str, value: Option<T>) -> Result<T, ApiError> {
    value.ok_or_else(|| ApiError::of(ApiCode::MissingParameter, field, "missing"))
}

/// Begin a file in parts
#[utoipa::path(post, path = "/v1/uploads", tag = "Files",
    request_body(content = ref("#/components/schemas/UploadRequest"), content_type = "application/json"),
    responses((status = 200, description = "The upload", body = ref("#/components/schemas/Upload"))))]
async fn create(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let caller = caller_of(&context)?;
    let _place = front.admit()?;
    let (head, body) = request.into_parts();
    let body = read_json(&front, &head.headers, body).await?;
    let asked: CreateBody = read(&body)?;
    let (bytes, limit) = (required("bytes", asked.bytes)?, front.args.files.file_bytes.0);
    if bytes > limit {
        let message = format!("{bytes}; {limit} are allowed");
        return Err(ApiError::of(ApiCode::RequestTooLarge, "bytes", message));
    }
    let life = asked.expires_after.as_ref();
    let life =
        life.map(|life| record::life("expires_after", life.anchor.as_deref(), life.seconds)).transpose()?;
    let upload = UploadRecord {
        id: new_id(PREFIX),
        bytes,
        filename: record::filename(&required("filename", asked.filename)?)?,
        mime_type: required("mime_type", asked.mime_type)?.chars().take(256).collect(),
        purpose: record::purpose(&required("purpose", asked.purpose)?)?,
        life: life.flatten(),
        created_at: now(),
        expires_at: now() + LIFE_SECONDS,
        status: UploadStatus::Pending,
        parts: Vec::new(),
        file: None,
    };
    front.archive.uploads.create(&key_of(&caller.tenant, &upload.id), &upload).await?;
    Ok(Json(upload.object()))
}

/// Upload a part
#[utoipa::path(post, path = "/v1/uploads/{id}/parts", tag = "Files",
    params(("id" = String, Path, description = "The upload's id")),
    request_body(content = ref("#/components/schemas/PartForm"), content_type = "multipart/form-data"),
    responses((status = 200, description = "The part", body = ref("#/components/schemas/UploadPart"))))]
async fn add_part(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let caller = caller_of(&context)?;
    let _place = front.admit()?;
    let _transfer = front.archive.transfer().await?;
    let (key, part) = (key_of(&caller.tenant, &id), new_id(PART_PREFIX));
    let blob = front.archive.blobs.empty(&part);
    let begun = |upload: &mut UploadRecord| {
        upload.pending()?;
        if upload.parts.len() == PARTS_MAX {
            let message = format!("an upload has at most {PARTS_MAX} parts");
            return Err(ApiError::new(ApiCode::InvalidParameter, message));
        }
        upload.parts.push(UploadPart { id: part.clone(), complete: false, blob: blob.clone() });
        Ok(())
    };
    change(&front, (&key, &id), begun).await?;
    let received = form::receive(&front, request, "data", &part).await;
    let stored = received.as_ref().ok().map(|(_, file)| file.blob.clone());
    let ended = |upload: &mut UploadRecord| {
        upload.pending()?;
        match (&stored, upload.parts.iter_mut().find(|known| known.id == part)) {
            (Some(blob), Some(known)) => (known.complete, known.blob) = (true, blob.clone()),
            _ => upload.parts.retain(|known| known.id != part),
        }
        Ok(())
    };
    let written = change(&front, (&key, &id), ended).await;
    if received.is_err() || written.is_err() {
        front.archive.forget(&[blob]).await;
    }
    received?;
    written?;
    Ok(Json(json!({"id": part, "object": "upload.part", "created_at": now(), "upload_id": id})))
}

#[derive(Debug, Deserialize)]
struct CompleteBody {
    part_ids: Option<Vec<String>>,
    md5: Option<String>,
}

/// Make the parts a file
#[utoipa::path(post, path = "/v1/uploads/{id}/complete", tag = "Files",
    params(("id" = String, Path, description = "The upload's id")),
    request_body(content = ref("#/components/schemas/UploadCompletion"), content_type = "application/json"),
    responses((status = 200, description = "The upload with its file", body = ref("#/components/schemas/Upload"))))]
async fn complete(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let caller = caller_of(&context)?;
    let _place = front.admit()?;
    let (head, body) = request.into_parts();
    let body = read_json(&front, &head.headers, body).await?;
    let asked: CompleteBody = read(&body)?;
    let part_ids = required("part_ids", asked.part_ids)?;
    let key = key_of(&caller.tenant, &id);
    let upload = find(&front, &key, &id).await?.value;
    if upload.status == UploadStatus::Completed {
        // The answer to the first request may have been lost.
        return Ok(Json(upload.object()));
    }
    upload.pending()?;
    let blobs = upload.assembled(&part_ids)?;
    if let Some(md5) = &asked.md5 {
        check(&front, &blobs, md5).await?;
    }
    let file = FileRecord {
        // The same from every request that completes the upload.
        id: format!("{}{}", record::PREFIX, &upload.id[PREFIX.len()..]),
        filename: upload.filename.clone(),
        purpose: upload.purpose.clone(),
        created_at: now(),
        expires_at: record::end(&upload.purpose, upload.life, now()),
        complete: true,
        blobs,
    };
    let completed = |upload: &mut UploadRecord| {
        if upload.status != UploadStatus::Completed {
            upload.pending()?;
            upload.status = UploadStatus::Completed;
            upload.file = Some(file.clone());
        }
        Ok(())
    };
    let upload = change(&front, (&key, &id), completed).await?;
    publish(&front, &caller.tenant, &upload).await?;
    Ok(Json(upload.object()))
}

/// Makes the file of a completed upload, and forgets the parts that are not in it.
async fn publish(front: &Front, tenant: &str, upload: &UploadRecord) -> Result<(), ApiError> {
    let Some(file) = &upload.file else { return Ok(()) };
    match front.archive.files.create(&key_of(tenant, &file.id), file).await {
        Ok(_) | Err(RecordError::Conflict) => {}
        Err(error) => return Err(error.into()),
    }
    let parts = upload.parts.iter().map(|part| part.blob.clone());
    let unused: Vec<Blob> = parts.filter(|blob| !file.blobs.iter().any(|used| used.id == blob.id)).collect();
    front.archive.forget(&unused).await;
    Ok(())
}

async fn check(front: &Front, blobs: &[Blob], md5: &str) -> Result<(), ApiError> {
    let mut hash = Md5::new();
    let mut pieces = std::pin::pin!(front.archive.blobs.read(blobs));
    while let Some(piece) = pieces.try_next().await? {
        hash.update(&piece);
    }
    let found: String = hash.finalize().encode_hex();
    if found.eq_ignore_ascii_case(md5) {
        return Ok(());
    }
    Err(ApiError::of(ApiCode::InvalidParameter, "md5", format_args!("the parts have {found}")))
}

/// Cancel an upload
#[utoipa::path(post, path = "/v1/uploads/{id}/cancel", tag = "Files",
    params(("id" = String, Path, description = "The upload's id")),
    responses((status = 200, description = "The upload", body = ref("#/components/schemas/Upload"))))]
async fn cancel(
    State(front): State<Arc<Front>>,
    Extension(context): Extension<Arc<RequestContext>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let caller = caller_of(&context)?;
    let _place = front.admit()?;
    let cancelled = |upload: &mut UploadRecord| {
        if upload.status != UploadStatus::Cancelled {
            upload.pending()?;
            upload.status = UploadStatus::Cancelled;
        }
        Ok(())
    };
    let upload = change(&front, (&key_of(&caller.tenant, &id), &id), cancelled).await?;
    let blobs: Vec<Blob> = upload.parts.iter().map(|part| part.blob.clone()).collect();
    front.archive.forget(&blobs).await;
    Ok(Json(upload.object()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::blobs::BlobPlace;

    fn upload(bytes: u64, parts: &[(&str, bool, u64)]) -> UploadRecord {
        let part = |&(id, complete, bytes): &(&str, bool, u64)| UploadPart {
            id: id.into(),
            complete,
            blob: Blob { id: id.into(), at: BlobPlace::Broker, bytes },
        };
        UploadRecord {
            id: "upload_1".into(),
            bytes,
            filename: "f".into(),
            mime_type: "text/plain".into(),
            purpose: "batch".into(),
            life: None,
            created_at: 0,
            expires_at: i64::MAX,
            status: UploadStatus::Pending,
            parts: parts.iter().map(part).collect(),
            file: None,
        }
    }

    #[test]
    fn a_file_is_its_parts_in_the_order_asked() {
        let upload = upload(5, &[("a", true, 2), ("b", true, 3), ("c", false, 0), ("d", true, 1)]);
        let ids = |ids: &[&str]| ids.iter().map(ToString::to_string).collect::<Vec<_>>();
        let blobs = upload.assembled(&ids(&["b", "a"])).unwrap();
        assert_eq!(blobs.iter().map(|blob| blob.id.as_str()).collect::<Vec<_>>(), ["b", "a"]);
        for (wrong, said) in [
            (&["a", "b", "c"][..], "no part \"c\""),
            (&["a", "b", "x"], "no part \"x\""),
            (&["a", "a"], "twice"),
            (&["a", "b", "d"], "6 bytes; the upload has 5"),
            (&[], "0 bytes"),
        ] {
            let error = upload.assembled(&ids(wrong)).unwrap_err();
            assert!(error.message.contains(said) && error.param.as_deref() == Some("part_ids"), "{error:?}");
        }
    }

    #[test]
    fn what_has_ended_takes_no_parts() {
        let mut ended = upload(0, &[]);
        assert!(ended.pending().is_ok());
        ended.status = UploadStatus::Cancelled;
        assert_eq!(ended.pending().unwrap_err().code, ApiCode::InvalidState);
        let late = UploadRecord { expires_at: 1, ..upload(0, &[]) };
        assert_eq!(late.pending().unwrap_err().code, ApiCode::InvalidState);
        assert_eq!(late.object()["status"], "expired");
    }
}
