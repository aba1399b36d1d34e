//! A job's one outcome: an OpenAI batch output line, and the closed set of error codes.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutcomeKind {
    /// It ran; the body holds the answer (of a job with many requests: one line for each).
    Completed,
    /// It could not run as asked: invalid, late or cancelled.
    Rejected,
    /// It was tried as often as allowed and failed; a copy lies in the DEAD stream.
    Dead,
}

impl OutcomeKind {
    /// The header value.
    pub fn as_str(self) -> &'static str {
        match self {
            OutcomeKind::Completed => "completed",
            OutcomeKind::Rejected => "rejected",
            OutcomeKind::Dead => "dead",
        }
    }
}

/// Why a request has no answer. The set is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorCode {
    /// The job or request is malformed or over a limit; the message names field, value and limit.
    InvalidRequest,
    /// `Millrace-Deadline` passed.
    DeadlineExceeded,
    /// Somebody cancelled it.
    Cancelled,
    /// The engine failed on it.
    InferenceError,
    /// Its workers died.
    WorkerLost,
    /// Its id was used before, with another body.
    IdReused,
}

impl ErrorCode {
    /// The code as it stands on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorCode::InvalidRequest => "INVALID_REQUEST",
            ErrorCode::DeadlineExceeded => "DEADLINE_EXCEEDED",
            ErrorCode::Cancelled => "CANCELLED",
            ErrorCode::InferenceError => "INFERENCE_ERROR",
            ErrorCode::WorkerLost => "WORKER_LOST",
            ErrorCode::IdReused => "ID_REUSED",
        }
    }
}

/// One OpenAI batch output line: exactly one of `response` and `error` is set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OutputLine {
    /// `<job>` for a job of one request, `<job>-<index>` for a line of many.
    pub id: String,
    /// The caller's id of the request: the job id, or the line's own `custom_id`.
    pub custom_id: String,
    /// The answer.
    pub response: Option<Response>,
    /// Why there is none.
    pub error: Option<LineError>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// 200.
    pub status_code: u16,
    /// Equal to the line's `id`.
    pub request_id: String,
    /// The OpenAI response object.
    pub body: Value,
}

/// A refusal or failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineError {
    /// One of a closed set.
    pub code: ErrorCode,
    /// What is wrong, for people: names field, value and limit.
    pub message: String,
}

/// The body of an outcome that was too large for a message, or was asked to go elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputReference {
    /// `s3://` address of the body: the bytes that the message would have held.
    pub output: String,
    /// Their number.
    pub bytes: u64,
    /// Their SHA-256 in hex.
    pub sha256: String,
}
