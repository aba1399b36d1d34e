//! A job's answer: the bytes of its outcome, and what they cost.

use bytes::Bytes;

/// A job's answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// The outcome's body: one `crds::result::OutputLine`, or one a line for a job of lines. Equal for each
    /// attempt of the job.
    pub body: Bytes,
    /// Requests answered.
    pub answered: usize,
    /// Requests that have an error line instead.
    pub refused: usize,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens generated, as far as they count.
    pub output_tokens: u64,
    /// From the start of the job to its first token; it is not part of the body.
    pub first_token_ms: Option<f64>,
}
