//! One job through the engine: its requests become sequences, their tokens text, the text an answer.
//!
//! Dropping the future cancels every sequence. The answer depends on the job, the model and the engine's
//! sizes alone, not on time, neighbours or the attempt.

use tokio::sync::mpsc;

use crate::completion::Completion;
use crate::engine::handle::EngineHandle;
use crate::job::{Job, Reject};
use crate::prompt::Text;

/// A piece of a choice's text, while the job runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta {
    /// Index of the request in the job.
    pub request: usize,
    /// Index of the choice in the request's answer.
    pub choice: u32,
    /// From 0, without gaps per request and choice, unless the receiver was too slow for the last one.
    pub number: u64,
    /// More text of the choice; may be empty in the last delta.
    pub text: String,
    /// In the last delta: `stop` or `length`.
    pub finish: Option<&'static str>,
}

/// Why a job has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// It can never have one.
    #[error(transparent)]
    Reject(#[from] Reject),
    /// The engine failed on one of its sequences; others run on.
    #[error("the engine failed on a sequence: {0}")]
    Sequence(String),
    /// The engine has ended: so must the process.
    #[error("the engine has stopped")]
    Stopped,
}

/// Runs a job. Deltas are sent without waiting: a receiver that is slow gets fewer and longer ones.
///
/// # Errors
/// In a job of lines, a line's own fault becomes its error line; only [`Fault::Stopped`] ends the job.
pub async fn generate(
    job: &Job,
    text: &Text,
    engine: &EngineHandle,
    deltas: Option<mpsc::Sender<Delta>>,
) -> Result<Completion, Fault> {
    let _ = (job, text, engine, deltas);
    Err(Fault::Stopped)
}
