//! What the queue's side needs from the engine's side: one job in, its answer or a fault out.
//!
//! The line from queue to outcome is written against [`Run`], so that its protocol is tested with a runner
//! that fails on purpose; [`EngineRun`] is the real one: decode, tokenize, generate.

use std::future::Future;

use bytes::Bytes;
use millrace_crds::job::JobHeaders;
use millrace_crds::names::Class;
use millrace_crds::tokens::TokenDelta;
use time::OffsetDateTime;
use tokio::sync::mpsc;

use millrace_engine::schedule::handle::{EngineHandle, EngineLoad, Limits};
use millrace_engine::schedule::request::Urgency;
use millrace_engine::text::generate;
use millrace_engine::text::job::{Job, JobLimits};
use millrace_engine::text::prompt::Text;
use millrace_queue::fault::Fault;

/// One attempt's input.
#[derive(Debug, Clone)]
pub struct Work {
    /// The class that the job was published with.
    pub class: Class,
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
    /// Of them, those that ended by themselves or at a stop; the others reached their length.
    pub stopped: u64,
    /// From the start of the attempt to its first token, in milliseconds.
    pub first_token_ms: Option<f64>,
    /// Unknown fields that the job lets the worker ignore.
    pub ignored_fields: Vec<String>,
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
    fn load(&self) -> &EngineLoad;
}

/// The real engine with the text side of its model.
#[derive(Debug, Clone)]
pub struct EngineRun {
    text: Text,
    engine: EngineHandle,
}

impl EngineRun {
    /// `text` and `engine` are of the same model folder.
    pub fn new(text: Text, engine: EngineHandle) -> Self {
        Self { text, engine }
    }
}

impl Run for EngineRun {
    async fn run(&self, work: Work, deltas: Option<mpsc::Sender<TokenDelta>>) -> Result<Answer, Fault> {
        let limits = JobLimits::from(self.engine.limits());
        let engine = self.engine.with_urgency(urgency(&work));
        let job = decode(work, limits).await?;
        let (sequences, ignored_fields) = (job.sequences() as u64, job.ignored_fields.clone());
        let completion = generate::generate(job, &self.text, &engine, deltas).await.map_err(fault_of)?;
        Ok(Answer {
            body: completion.body,
            prompt_tokens: completion.prompt_tokens,
            output_tokens: completion.output_tokens,
            sequences,
            stopped: completion.stopped,
            first_token_ms: completion.first_token_ms,
            ignored_fields,
        })
    }

    fn limits(&self) -> Limits {
        self.engine.limits()
    }

    fn load(&self) -> &EngineLoad {
        self.engine.load()
    }
}

/// What the engine serves first: the job's class, then its deadline.
fn urgency(work: &Work) -> Urgency {
    let deadline = work.headers.deadline.map(|deadline| deadline.unix_timestamp_nanos() / 1_000_000);
    let deadline_ms = deadline.and_then(|ms| i64::try_from(ms).ok()).unwrap_or(i64::MAX);
    Urgency { class: work.class, deadline_ms }
}

/// Bodies up to this size are decoded in place: shorter than the way to another thread and back.
const DECODE_INLINE_BYTES_MAX: usize = 64 << 10;

async fn decode(work: Work, limits: JobLimits) -> Result<Job, Fault> {
    let Work { headers, published, body, .. } = work;
    let created = published.unix_timestamp();
    let decoded = if body.len() <= DECODE_INLINE_BYTES_MAX {
        Job::decode(headers, created, &body, &limits)
    } else {
        let decoding = tokio::task::spawn_blocking(move || Job::decode(headers, created, &body, &limits));
        // A panic aborts the process before it could arrive here; a shutdown cancels.
        decoding.await.map_err(|_| Fault::Draining)?
    };
    decoded.map_err(|reject| fault_of(reject.into()))
}

/// What the text side's fault is for the queue.
fn fault_of(fault: generate::AnswerError) -> Fault {
    match fault {
        generate::AnswerError::Reject(reject) => Fault::Invalid { message: reject.to_string() },
        generate::AnswerError::Sequence(message) => Fault::Inference { message },
        generate::AnswerError::Stopped => Fault::EngineStopped { cause: "the engine has stopped".into() },
    }
}
