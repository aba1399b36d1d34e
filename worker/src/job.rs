//! A job, decoded and checked: pure, no tokenizer, no clock.
//!
//! The body is one OpenAI request (chat completions or completions), or OpenAI batch lines when the
//! headers say so. A bad single request refuses the job; a bad batch line refuses that line alone.
//! Every refusal names field, value and limit, and nothing outside of the limits here gets through.

use millrace_crds::job::JobHeaders;
use millrace_crds::result::ErrorCode;

use crate::engine::handle::Limits;
use crate::engine::request::Sampling;

/// What a job may ask for. The numbers come from the engine; the rest are constants of this module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobLimits {
    /// Longest prompt plus output, in tokens.
    pub max_model_len: u32,
    /// Token ids must be below this.
    pub vocabulary: u32,
}

impl From<Limits> for JobLimits {
    fn from(limits: Limits) -> Self {
        Self { max_model_len: limits.max_model_len, vocabulary: limits.vocabulary }
    }
}

/// A decoded job.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// What its headers say.
    pub headers: JobHeaders,
    /// When it was published, in Unix seconds: the broker's timestamp of the message, so that each
    /// attempt answers with the same bytes.
    pub created: i64,
    /// Its requests, in order.
    pub lines: Vec<Line>,
}

/// One request of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Where it stands in the job.
    pub index: usize,
    /// `<job>` in a job of one request, `<job>-<index>` in a job of lines.
    pub id: String,
    /// The caller's id of it: the job id, or the line's own.
    pub custom_id: String,
    /// What is asked, or why it is refused.
    pub request: Result<TextRequest, Reject>,
}

/// One OpenAI request.
#[derive(Debug, Clone, PartialEq)]
pub struct TextRequest {
    /// What to continue.
    pub input: Input,
    /// How.
    pub params: Params,
}

/// What to continue.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// A conversation, rendered with the model's chat template.
    Chat(Vec<Message>),
    /// One prompt, or several that are answered in one response object.
    Prompts(Vec<PromptInput>),
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Such as `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptInput {
    /// Text to tokenize.
    Text(String),
    /// Tokens as they are.
    Tokens(Vec<u32>),
}

/// How to continue.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// Choices per prompt.
    pub n: u32,
    /// Most tokens per choice.
    pub max_tokens: Option<u32>,
    /// Texts that end a choice.
    pub stop: Vec<String>,
    /// Tokens that end a choice, beside the model's own.
    pub stop_token_ids: Vec<u32>,
    /// The caller's seed.
    pub seed: Option<u64>,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// Why a job or a request of it can never run. The message names field, value and limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reject {
    /// It is not what it must be.
    #[error("{0}")]
    Invalid(String),
}

impl Reject {
    /// The code on the wire.
    pub fn code(&self) -> ErrorCode {
        ErrorCode::InvalidRequest
    }
}

impl Job {
    /// Decodes a job's body.
    ///
    /// # Errors
    /// When the job as a whole is refused: a malformed single request, no line, too many lines.
    pub fn decode(headers: JobHeaders, created: i64, body: &[u8], limits: &JobLimits) -> Result<Job, Reject> {
        let _ = (headers, created, limits);
        Err(Reject::Invalid(format!("body of {} bytes", body.len())))
    }
}
