//! A form with one file in it, whose content goes into the store as it comes. Fields may stand before it and behind it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use axum::body::BodyDataStream;
use axum::extract::Request;
use bytes::Bytes;
use futures::StreamExt;

use crate::http::blobs::{Blob, BlobWriter};
use crate::http::error::{ApiCode, ApiError};
use crate::http::front::Front;
use crate::http::inference::text;
use crate::http::multipart::{FormEvent, MultipartForm};

/// Most fields of a form, beside its file.
const FIELDS_MAX: usize = 16;
/// Longest value of a field, in bytes.
const FIELD_BYTES_MAX: usize = 1024;
/// How long a whole form may take.
const TIME_MAX: Duration = Duration::from_secs(3500);
/// Of a form that is refused, this much is read and thrown away, so that its sender gets to read the answer.
const DISCARDED_BYTES_MAX: usize = 64 << 20;

/// The fields beside the file, by their names.
#[derive(Debug, Default)]
pub struct FormFields(BTreeMap<String, String>);

impl FormFields {
    /// A field's value.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

/// The file of a form, which is in the store.
#[derive(Debug)]
pub struct FormFile {
    /// Its name, if the form has one.
    pub filename: Option<String>,
    /// Its content.
    pub blob: Blob,
}

/// Receives a form whose part `part` is a file; its content is stored under `id`.
///
/// # Errors
/// [`ApiCode::UnsupportedMediaType`], [`ApiCode::InvalidParameter`], [`ApiCode::MissingParameter`],
/// [`ApiCode::RequestTooLarge`], [`ApiCode::BodyTimeout`], and those of the store.
pub async fn receive(
    front: &Front,
    request: Request,
    part: &str,
    id: &str,
) -> Result<(FormFields, FormFile), ApiError> {
    let (head, body) = request.into_parts();
    let content_type = text(&head.headers, "content-type").ok().flatten().unwrap_or_default();
    let form = MultipartForm::new(content_type)
        .map_err(|reason| ApiError::new(ApiCode::UnsupportedMediaType, reason))?;
    let mut incoming = Incoming {
        body: body.into_data_stream(),
        silence: front.args.body_timeout.0,
        over_at: Instant::now() + TIME_MAX,
    };
    let mut receipt = Receipt {
        part: part.to_owned(),
        bytes_max: front.args.files.file_bytes.0,
        writer: Some(front.archive.blobs.writer(id)),
        filename: None,
        fields: FormFields::default(),
        current: None,
        file: None,
    };
    let received = receipt.run(form, &mut incoming).await;
    if let Err(error) = received {
        incoming.discard().await;
        return Err(error);
    }
    let file = receipt.file.take();
    let file = file.ok_or_else(|| ApiError::of(ApiCode::MissingParameter, part, "missing"))?;
    Ok((receipt.fields, FormFile { filename: receipt.filename, blob: file }))
}

/// A body that comes in time.
struct Incoming {
    body: BodyDataStream,
    silence: Duration,
    over_at: Instant,
}

impl Incoming {
    async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        let left = self.over_at.saturating_duration_since(Instant::now()).min(self.silence);
        let late = || ApiError::new(ApiCode::BodyTimeout, "the body did not come in time");
        let piece = tokio::time::timeout(left, self.body.next()).await.map_err(|_| late())?;
        // Who left in the middle of a body reads no answer.
        piece.transpose().map_err(|_| ApiError::new(ApiCode::InvalidParameter, "the body broke off"))
    }

    async fn discard(&mut self) {
        let mut seen = 0;
        while let Ok(Some(piece)) = self.next().await {
            seen += piece.len();
            if seen > DISCARDED_BYTES_MAX {
                return;
            }
        }
    }
}

/// The part that is being read.
enum CurrentPart {
    File,
    Field(String, Vec<u8>),
}

/// A form on its way into the store.
struct Receipt {
    part: String,
    bytes_max: u64,
    writer: Option<BlobWriter>,
    filename: Option<String>,
    fields: FormFields,
    current: Option<CurrentPart>,
    file: Option<Blob>,
}

impl Receipt {
    async fn run(&mut self, mut form: MultipartForm, incoming: &mut Incoming) -> Result<(), ApiError> {
        let wrong = |reason| ApiError::new(ApiCode::InvalidParameter, format!("the form: {reason}"));
        let mut finished = false;
        while let Some(piece) = incoming.next().await? {
            form.feed(&piece);
            while let Some(event) = form.event().map_err(wrong)? {
                finished |= event == FormEvent::Finished;
                self.take(event).await?;
            }
        }
        if finished { Ok(()) } else { Err(wrong("it has no end".to_owned())) }
    }

    async fn take(&mut self, event: FormEvent) -> Result<(), ApiError> {
        let wrong = |reason: String| ApiError::new(ApiCode::InvalidParameter, format!("the form: {reason}"));
        match event {
            FormEvent::Begin { name, filename } if name == self.part => {
                if self.file.is_some() {
                    return Err(wrong(format!("it has more than one part {name:?}")));
                }
                self.filename = filename;
                self.current = Some(CurrentPart::File);
            }
            FormEvent::Begin { name, .. } => {
                if self.fields.0.len() == FIELDS_MAX || name.len() > FIELD_BYTES_MAX {
                    return Err(wrong(format!(
                        "it has more than {FIELDS_MAX} fields, or one with a long name"
                    )));
                }
                self.current = Some(CurrentPart::Field(name, Vec::new()));
            }
            FormEvent::Data(bytes) => match (&mut self.current, &mut self.writer) {
                (Some(CurrentPart::File), Some(writer)) => {
                    let (so_far, limit) = (writer.bytes() + bytes.len() as u64, self.bytes_max);
                    if so_far > limit {
                        let message = format!("it has {so_far} bytes or more; {limit} are allowed");
                        return Err(ApiError::of(ApiCode::RequestTooLarge, &self.part, message));
                    }
                    writer.write(bytes).await?;
                }
                (Some(CurrentPart::Field(name, value)), _) => {
                    value.extend_from_slice(&bytes);
                    if value.len() > FIELD_BYTES_MAX {
                        return Err(wrong(format!("field {name:?} has more than {FIELD_BYTES_MAX} bytes")));
                    }
                }
                _ => {}
            },
            FormEvent::End => match self.current.take() {
                Some(CurrentPart::File) => {
                    if let Some(writer) = self.writer.take() {
                        self.file = Some(writer.finish().await?);
                    }
                }
                Some(CurrentPart::Field(name, value)) => {
                    let value = String::from_utf8(value);
                    let value = value.map_err(|_| wrong(format!("field {name:?} is not UTF-8")))?;
                    self.fields.0.insert(name, value);
                }
                None => {}
            },
            FormEvent::Finished => {}
        }
        Ok(())
    }
}
