//! What the queue's side needs from the engine's side: one job in, its answer or a fault out.
//!
//! The line from queue to outcome is written against [`Run`], so that its protocol is tested with a runner
//! that fails on purpose.

use std::future::Future;

use bytes::Bytes;
use millrace_crds::job::JobHeaders;
use millrace_crds::tokens::TokenDelta;
use time::OffsetDateTime;
use tokio::sync::mpsc;

use crate::engine::handle::{Limits, Load};
use crate::fault::Fault;

/// One attempt's input.
#[derive(Debug, Clone)]
pub struct Work {
    /// What the job's headers say.
    pub headers: JobHeaders,
    /// When the broker stored the job: the answer's timestamp, equal for every attempt.
    pub published: OffsetDateTime,
    /// The body, from the message or from behind its claim check.
    pub body: Bytes,
}

/// A job's answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The outcome's body; equal for every attempt.
    pub body: Bytes,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Sequences run.
    pub sequences: u64,
    /// From the start of the attempt to its first token, in milliseconds.
    pub first_token_ms: Option<f64>,
}

/// Runs jobs.
pub trait Run: Send + Sync + 'static {
    /// Runs one job. Dropping the future cancels it. Deltas are sent without waiting.
    fn run(
        &self,
        work: Work,
        deltas: Option<mpsc::Sender<TokenDelta>>,
    ) -> impl Future<Output = Result<Answer, Fault>> + Send;

    /// What the engine's sizes allow.
    fn limits(&self) -> Limits;

    /// The engine's counters; among them the steps, which are its only sign of life.
    fn load(&self) -> &Load;
}
