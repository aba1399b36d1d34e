//! Errors as OpenAI's clients expect them, from one closed table.
//!
//! The clients retry 408, 409, 429 and 5xx unless `x-should-retry` says otherwise, and believe a `Retry-After` of 1 to
//! 120 s alone: the table never says 0, and says "never" where a retry would only cost.

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use millrace_crds::result::{ErrorCode, LineError};
use serde_json::{Value, json};

/// Longest part of a message that is taken for the name of a field, in bytes.
const PARAM_BYTES_MAX: usize = 128;
/// The header that says whether a client shall try again.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Whether the same request may succeed later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// No.
    Never,
    /// After this many seconds.
    After(u32),
}

/// What went wrong. The set is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApiCode {
    /// The body is no JSON object.
    InvalidJson,
    /// A header, a parameter of the path or of the query is wrong.
    InvalidParameter,
    /// A field that must be there is not.
    MissingParameter,
    /// The body is of another content type.
    UnsupportedMediaType,
    /// The body is larger than allowed.
    RequestTooLarge,
    /// The body did not come in time.
    BodyTimeout,
    /// There is no such path.
    UnknownUrl,
    /// The path has no such method.
    MethodNotAllowed,
    /// There is no key, or not a good one.
    InvalidApiKey,
    /// The key may not do that.
    InsufficientPermissions,
    /// There is no such model.
    ModelNotFound,
    /// There is no such job, or its outcome has expired.
    JobNotFound,
    /// There is no such file, or it has expired.
    FileNotFound,
    /// There is no such upload.
    UploadNotFound,
    /// There is no such batch.
    BatchNotFound,
    /// A batch reads the file.
    FileInUse,
    /// What is asked for is over: the upload or the batch has ended.
    InvalidState,
    /// The key or the tenant had as much as it may.
    RateLimitExceeded,
    /// The gateway runs as many requests as it may, or holds as many bytes.
    Overloaded,
    /// There is no room for files.
    StorageFull,
    /// The model's queue is full.
    QueueFull,
    /// The broker does not answer.
    BrokerUnavailable,
    /// The identity provider does not answer.
    ProviderUnavailable,
    /// The stored outcome cannot be read.
    OutcomeUnreadable,
    /// What was streamed is not how the stored outcome begins.
    StreamDiverged,
    /// The gateway itself failed.
    Internal,
    /// The outcome says so.
    Job(ErrorCode),
}

/// All codes.
pub const CODES: [ApiCode; 32] = [
    ApiCode::InvalidJson,
    ApiCode::InvalidParameter,
    ApiCode::MissingParameter,
    ApiCode::UnsupportedMediaType,
    ApiCode::RequestTooLarge,
    ApiCode::BodyTimeout,
    ApiCode::UnknownUrl,
    ApiCode::MethodNotAllowed,
    ApiCode::InvalidApiKey,
    ApiCode::InsufficientPermissions,
    ApiCode::ModelNotFound,
    ApiCode::JobNotFound,
    ApiCode::RateLimitExceeded,
    ApiCode::FileNotFound,
    ApiCode::UploadNotFound,
    ApiCode::BatchNotFound,
    ApiCode::FileInUse,
    ApiCode::InvalidState,
    ApiCode::Overloaded,
    ApiCode::StorageFull,
    ApiCode::QueueFull,
    ApiCode::BrokerUnavailable,
    ApiCode::ProviderUnavailable,
    ApiCode::OutcomeUnreadable,
    ApiCode::StreamDiverged,
    ApiCode::Internal,
    ApiCode::Job(ErrorCode::InvalidRequest),
    ApiCode::Job(ErrorCode::DeadlineExceeded),
    ApiCode::Job(ErrorCode::Cancelled),
    ApiCode::Job(ErrorCode::InferenceError),
    ApiCode::Job(ErrorCode::WorkerLost),
    ApiCode::Job(ErrorCode::IdReused),
];

const REQUEST: &str = "invalid_request_error";
const AUTHENTICATION: &str = "authentication_error";
const PERMISSION: &str = "permission_error";
const RATE_LIMIT: &str = "rate_limit_error";
const SERVER: &str = "server_error";

impl ApiCode {
    /// Status, `type`, `code`, and whether to try again: a row of the table.
    pub fn row(self) -> (u16, &'static str, &'static str, Retry) {
        match self {
            ApiCode::InvalidJson => (400, REQUEST, "invalid_json", Retry::Never),
            ApiCode::InvalidParameter => (400, REQUEST, "invalid_parameter", Retry::Never),
            ApiCode::MissingParameter => (400, REQUEST, "missing_required_parameter", Retry::Never),
            ApiCode::UnsupportedMediaType => (415, REQUEST, "unsupported_media_type", Retry::Never),
            ApiCode::RequestTooLarge => (413, REQUEST, "request_too_large", Retry::Never),
            ApiCode::BodyTimeout => (408, REQUEST, "body_timeout", Retry::After(1)),
            ApiCode::UnknownUrl => (404, REQUEST, "unknown_url", Retry::Never),
            ApiCode::MethodNotAllowed => (405, REQUEST, "method_not_allowed", Retry::Never),
            ApiCode::InvalidApiKey => (401, AUTHENTICATION, "invalid_api_key", Retry::Never),
            ApiCode::InsufficientPermissions => (403, PERMISSION, "insufficient_permissions", Retry::Never),
            ApiCode::ModelNotFound => (404, REQUEST, "model_not_found", Retry::Never),
            ApiCode::JobNotFound => (404, REQUEST, "job_not_found", Retry::Never),
            ApiCode::RateLimitExceeded => (429, RATE_LIMIT, "rate_limit_exceeded", Retry::After(1)),
            ApiCode::FileNotFound => (404, REQUEST, "file_not_found", Retry::Never),
            ApiCode::UploadNotFound => (404, REQUEST, "upload_not_found", Retry::Never),
            ApiCode::BatchNotFound => (404, REQUEST, "batch_not_found", Retry::Never),
            ApiCode::FileInUse => (409, REQUEST, "file_in_use", Retry::Never),
            ApiCode::InvalidState => (409, REQUEST, "invalid_state", Retry::Never),
            ApiCode::StorageFull => (503, SERVER, "storage_full", Retry::After(60)),
            ApiCode::Overloaded => (503, SERVER, "overloaded", Retry::After(2)),
            ApiCode::QueueFull => (503, SERVER, "queue_full", Retry::After(10)),
            ApiCode::BrokerUnavailable => (503, SERVER, "broker_unavailable", Retry::After(2)),
            ApiCode::ProviderUnavailable => (503, SERVER, "provider_unavailable", Retry::After(5)),
            ApiCode::OutcomeUnreadable => (500, SERVER, "outcome_unreadable", Retry::Never),
            ApiCode::StreamDiverged => (500, SERVER, "stream_diverged", Retry::After(1)),
            ApiCode::Internal => (500, SERVER, "internal_error", Retry::After(1)),
            ApiCode::Job(ErrorCode::InvalidRequest) => (400, REQUEST, "invalid_request", Retry::Never),
            ApiCode::Job(ErrorCode::DeadlineExceeded) => (504, SERVER, "deadline_exceeded", Retry::Never),
            ApiCode::Job(ErrorCode::Cancelled) => (409, REQUEST, "cancelled", Retry::Never),
            ApiCode::Job(ErrorCode::InferenceError) => (500, SERVER, "inference_error", Retry::Never),
            ApiCode::Job(ErrorCode::WorkerLost) => (500, SERVER, "worker_lost", Retry::Never),
            ApiCode::Job(ErrorCode::IdReused) => (409, REQUEST, "id_reused", Retry::Never),
        }
    }
}

/// One error for a client. Its message is for people and holds no secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// What went wrong.
    pub code: ApiCode,
    /// The same in words.
    pub message: String,
    /// Which field of the request is to blame.
    pub param: Option<String>,
}

impl ApiError {
    /// An error that no field is to blame for.
    pub fn new(code: ApiCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), param: None }
    }

    /// An error of one field; the message begins with its name.
    pub fn of(code: ApiCode, param: &str, message: impl std::fmt::Display) -> Self {
        Self { code, message: format!("{param}: {message}"), param: Some(param.to_owned()) }
    }

    /// What a job's outcome says. A refusal begins with the field's path.
    pub fn of_job(error: &LineError) -> Self {
        let param = match error.code {
            ErrorCode::InvalidRequest => field_of(&error.message),
            _ => None,
        };
        Self { code: ApiCode::Job(error.code), message: error.message.clone(), param }
    }

    /// OpenAI's object.
    pub fn body(&self) -> Value {
        let (_, kind, code, _) = self.code.row();
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": code}})
    }
}

/// The path of a field at a message's beginning, such as `messages[0].role`.
fn field_of(message: &str) -> Option<String> {
    let (field, _) = message.split_once(": ")?;
    let mut bytes = field.bytes();
    let first = bytes.next()?.is_ascii_lowercase();
    let rest = bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'[' | b']'));
    (first && rest && field.len() <= PARAM_BYTES_MAX).then(|| field.to_owned())
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, _, _, retry) = self.code.row();
        let status = StatusCode::from_u16(status).expect("the table holds status codes");
        let body = self.body().to_string();
        let mut response = (status, [(header::CONTENT_TYPE, "application/json")], body).into_response();
        let headers = response.headers_mut();
        match retry {
            Retry::Never => {
                headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
            }
            Retry::After(seconds) => {
                headers.insert(SHOULD_RETRY, HeaderValue::from_static("true"));
                headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_table_is_one_that_clients_obey() {
        let mut codes = BTreeSet::new();
        for code in CODES {
            let (status, kind, text, retry) = code.row();
            assert!(codes.insert(text), "{text} stands for two things");
            assert_eq!(kind == SERVER, status >= 500, "{text}");
            // Python's client does not wait for longer than 120 s, and npm's takes 0 for at once.
            assert!(matches!(retry, Retry::Never | Retry::After(1..=60)), "{text}");
        }
    }

    #[test]
    fn the_table_stands_in_the_documents() {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/http.md")).unwrap();
        for code in CODES {
            let (status, kind, text, retry) = code.row();
            let retry = match retry {
                Retry::Never => "no".to_owned(),
                Retry::After(seconds) => format!("after {seconds} s"),
            };
            let row = format!("| `{text}` | {status} | `{kind}` | {retry} |");
            assert!(page.contains(&row), "docs/http.md lacks {row}");
        }
    }

    #[test]
    fn a_refusal_names_its_field() {
        let error = |code, message: &str| LineError { code, message: message.to_owned() };
        let refused =
            ApiError::of_job(&error(ErrorCode::InvalidRequest, "messages[0].role: \"x\" is not a role"));
        assert_eq!(refused.param.as_deref(), Some("messages[0].role"));
        assert_eq!(refused.body()["error"]["code"], "invalid_request");
        for message in ["the job: is late", "no field at all", "Odd: x"] {
            assert_eq!(ApiError::of_job(&error(ErrorCode::InvalidRequest, message)).param, None, "{message}");
        }
        assert_eq!(ApiError::of_job(&error(ErrorCode::WorkerLost, "temperature: x")).param, None);
    }
}
