//! Why a job or one of its requests can never run. Messages name field, value and limit.

use millrace_crds::result::ErrorCode;

use crate::schedule::request::Refusal;

/// A refusal; trying again cannot help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reject {
    /// Not JSON at all.
    #[error("{field} is not JSON: {error}")]
    NotJson {
        /// The body or the line.
        field: &'static str,
        /// What the parser says; it quotes no text.
        error: String,
    },
    /// A field has the wrong type or value.
    #[error("{field}: {value} is not {expected}")]
    Value {
        /// The field's path.
        field: String,
        /// Its value, cut short; of text that may be private only its kind.
        value: String,
        /// What it must be, with limits.
        expected: String,
    },
    /// A field that must be there is not.
    #[error("{field}: missing; must be {expected}")]
    Missing {
        /// The field's path.
        field: String,
        /// What it must be.
        expected: &'static str,
    },
    /// A field that this version does not know. Ignoring it could change the meaning of a job silently.
    #[error("{field}: unknown field")]
    Unknown {
        /// The field's path.
        field: String,
    },
    /// A field that is known and cannot be honoured.
    #[error("{field}: not supported; {reason}")]
    Unsupported {
        /// The field's path.
        field: String,
        /// What would be accepted.
        reason: &'static str,
    },
    /// Text with too many bytes.
    #[error("{field}: {bytes} bytes exceed the limit of {limit}")]
    TooLong {
        /// The field's path.
        field: String,
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// A list with too many entries.
    #[error("{field}: more than {limit} {what}")]
    TooMany {
        /// The field's path.
        field: String,
        /// What the entries are.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// Two lines with one `custom_id`.
    #[error("custom_id: {custom_id:?} is already taken by line {first} (counted from 0)")]
    Duplicate {
        /// The id.
        custom_id: String,
        /// The line that keeps it.
        first: usize,
    },
    /// The model's folder has no chat template.
    #[error("messages: the model has no chat template; send a prompt instead")]
    NoTemplate,
    /// The chat template refused the conversation, or broke a limit.
    #[error("messages: the chat template failed: {0}")]
    Template(String),
    /// The tokenizer failed on the prompt.
    #[error("prompt: the tokenizer failed: {0}")]
    Tokenizer(String),
    /// The engine can never run it.
    #[error("{field}: {refusal}")]
    Engine {
        /// Which prompt.
        field: String,
        /// Names value and limit.
        refusal: Refusal,
    },
    /// The answer grew beyond what one outcome may hold.
    #[error("the answer exceeds the limit of {limit} bytes; split the job")]
    AnswerTooLong {
        /// The limit.
        limit: usize,
    },
}

impl Reject {
    /// The code on the wire.
    pub fn code(&self) -> ErrorCode {
        ErrorCode::InvalidRequest
    }
}
