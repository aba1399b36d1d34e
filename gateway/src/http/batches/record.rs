//! A batch as it is kept, and what may become of it: a pure state machine.
//!
//! A batch is `validating`, then `failed` or `in_progress`; `finalizing` and `completed`, or `expired`; or, on its
//! client's wish, `cancelling` and `cancelled`. A gateway that runs it holds a claim, which is a text in the record:
//! each write is accepted only where the record is as the writer last read it, so that of two gateways that take the
//! same batch for theirs, one gets no further. What was written to the output is known by `written`, the number of
//! lines from the beginning whose results stand in the record's blobs: a line is written by the very write that counts
//! it.

use millrace_crds::names::{Class, ModelRef};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::http::blobs::Blob;
use crate::http::keys::KeyScopes;

/// What an id begins with.
pub const PREFIX: &str = "batch_";
/// Seconds that the record of a batch stays behind its end.
const KEPT_SECONDS: i64 = 30 * 24 * 3600;
/// Seconds before the tries of a webhook; the number is that of the tries.
const WEBHOOK_PAUSES: [i64; 7] = [0, 5, 30, 120, 600, 1800, 3600];

/// How a batch stands, in OpenAI's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BatchStatus {
    /// Its input is read for the first time.
    Validating,
    /// Its input is wrong; nothing ran.
    Failed,
    /// Its lines run.
    InProgress,
    /// All lines have results; its files are made.
    Finalizing,
    /// It is done.
    Completed,
    /// Its time was over before all lines had results.
    Expired,
    /// It is being cancelled.
    Cancelling,
    /// It was cancelled.
    Cancelled,
}

impl BatchStatus {
    /// Whether nothing follows.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Failed | Self::Completed | Self::Expired | Self::Cancelled)
    }
}

/// When a batch came to stand so, in Unix seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchTimes {
    in_progress_at: Option<i64>,
    finalizing_at: Option<i64>,
    completed_at: Option<i64>,
    failed_at: Option<i64>,
    expired_at: Option<i64>,
    cancelling_at: Option<i64>,
    cancelled_at: Option<i64>,
}

/// What is wrong with a line of the input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineFault {
    /// A word for programs.
    pub code: String,
    /// The line, from 1, unless it is the whole file.
    pub line: Option<u64>,
    /// The same for people.
    pub message: String,
    /// Which field.
    pub param: Option<String>,
}

/// How many lines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineCounts {
    /// In the input.
    pub total: u64,
    /// With an answer.
    pub completed: u64,
    /// With an error.
    pub failed: u64,
}

/// Tokens of all answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenCounts {
    /// Of the prompts.
    pub input: u64,
    /// Generated.
    pub output: u64,
}

/// Whom to tell of the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WebhookTarget {
    /// Where.
    pub url: String,
    /// What signs it: `whsec_` and base64.
    pub secret: String,
    /// Tries made.
    pub tries: u32,
    /// When the next one is due, in Unix seconds; none after the last, or after success.
    pub due_at: Option<i64>,
}

/// Results that were stored: of these many lines, in their order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResultSegment {
    /// Lines that were written before it.
    pub from: u64,
    /// Lines.
    pub lines: u64,
    /// Of these with an answer.
    pub completed: u64,
    /// Their tokens.
    pub tokens: TokenCounts,
    /// The answers, if there are any.
    pub output: Option<Blob>,
    /// The errors, if there are any.
    pub errors: Option<Blob>,
    /// Whether lines were given up because the batch's time was over.
    pub late: bool,
}

/// A batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchRecord {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub tenant: String,
    /// The path that its lines name.
    pub endpoint: String,
    /// The file with its lines.
    pub input_file_id: String,
    /// How long it may take, in the client's words.
    pub completion_window: String,
    /// The client's own.
    pub metadata: Option<Map<String, Value>>,
    /// Seconds that its output lives, if the client says so.
    pub output_life: Option<i64>,
    /// Class of its jobs.
    pub class: Class,
    /// What its maker may do.
    pub scopes: KeyScopes,
    /// Whom to tell of its end.
    pub webhook: Option<WebhookTarget>,
    /// When it was made, in Unix seconds.
    pub created_at: i64,
    /// When its time is over.
    pub expires_at: i64,
    /// How it stands.
    pub status: BatchStatus,
    /// Since when.
    pub times: BatchTimes,
    /// Its model, as its lines call it, once they were read.
    pub model: Option<String>,
    /// The same as namespace and name.
    pub queue: Option<(String, String)>,
    /// What is wrong with its input.
    pub errors: Vec<LineFault>,
    /// Lines as far as they are known to have results.
    pub counts: LineCounts,
    /// Lines whose results are written, from the first on.
    pub written: u64,
    /// Of these with an answer.
    pub answered: u64,
    /// Tokens of the answers that are written.
    pub tokens: TokenCounts,
    /// The answers that are written.
    pub output: Vec<Blob>,
    /// The errors that are written.
    pub error_output: Vec<Blob>,
    /// The file of the answers.
    pub output_file_id: Option<String>,
    /// The file of the errors.
    pub error_file_id: Option<String>,
    /// Whether lines were given up because its time was over.
    pub late: bool,
    /// Who runs it.
    pub claim: Option<String>,
}

/// A batch that has not ended, or that somebody is still to be told of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActiveBatch {
    /// Its record's key.
    pub key: String,
    /// The file that it reads.
    pub input_file_id: String,
    /// When it was made, in Unix seconds.
    pub created_at: i64,
}

/// What is to be done for a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchTask {
    /// Read its input.
    Validate,
    /// Get the results of the lines that have none.
    Run,
    /// Make its files.
    Finish,
    /// Tell of its end.
    Notify,
    /// Nothing.
    Rest,
}

impl BatchRecord {
    /// What is to be done next.
    pub fn task(&self) -> BatchTask {
        match self.status {
            BatchStatus::Validating => BatchTask::Validate,
            BatchStatus::InProgress | BatchStatus::Cancelling if self.written < self.counts.total => {
                BatchTask::Run
            }
            BatchStatus::InProgress | BatchStatus::Cancelling | BatchStatus::Finalizing => BatchTask::Finish,
            _ if self.webhook.as_ref().is_some_and(|hook| hook.due_at.is_some()) => BatchTask::Notify,
            _ => BatchTask::Rest,
        }
    }

    /// Why no more jobs are published, if so: its client cancelled it, or its time is over.
    pub fn stop(&self, now: i64) -> Option<BatchStatus> {
        match self.status {
            BatchStatus::Cancelling => Some(BatchStatus::Cancelled),
            _ if now >= self.expires_at => Some(BatchStatus::Expired),
            _ => None,
        }
    }

    /// Whether its record is of no use any more.
    pub fn is_forgotten(&self, now: i64) -> bool {
        self.status.has_ended() && self.task() == BatchTask::Rest && self.ended_at() + KEPT_SECONDS <= now
    }

    fn ended_at(&self) -> i64 {
        let t = &self.times;
        let ends = [t.completed_at, t.failed_at, t.expired_at, t.cancelled_at];
        ends.into_iter().flatten().next().unwrap_or(i64::MAX - KEPT_SECONDS)
    }

    /// Its input was read and is good.
    pub fn validated(&mut self, model: &str, queue: &ModelRef, lines: u64, now: i64) {
        if self.status == BatchStatus::Validating {
            self.status = BatchStatus::InProgress;
            self.times.in_progress_at = Some(now);
            self.model = Some(model.to_owned());
            self.queue = Some((queue.namespace.to_string(), queue.name.to_string()));
            self.counts.total = lines;
        }
    }

    /// Its input was read and is wrong.
    pub fn refused(&mut self, errors: Vec<LineFault>, now: i64) {
        if self.status == BatchStatus::Validating {
            self.status = BatchStatus::Failed;
            self.times.failed_at = Some(now);
            self.errors = errors;
            self.ended(now);
        }
    }

    /// Its client cancels it; `false` where it has ended, or nearly so.
    pub fn cancel(&mut self, now: i64) -> bool {
        match self.status {
            BatchStatus::Validating | BatchStatus::InProgress => {
                self.status = BatchStatus::Cancelling;
                self.times.cancelling_at = Some(now);
                true
            }
            BatchStatus::Cancelling | BatchStatus::Cancelled => true,
            _ => false,
        }
    }

    /// These lines follow those that are written. That they are written already changes nothing.
    pub fn wrote(&mut self, segment: ResultSegment) {
        if segment.from != self.written {
            return;
        }
        self.written += segment.lines;
        self.answered += segment.completed;
        self.tokens.input += segment.tokens.input;
        self.tokens.output += segment.tokens.output;
        self.output.extend(segment.output);
        self.error_output.extend(segment.errors);
        self.late |= segment.late;
        self.saw(0, 0);
    }

    /// So many lines beyond those that are written are known to have an answer, and so many an error.
    pub fn saw(&mut self, completed: u64, failed: u64) {
        let errors = self.written - self.answered;
        // What another gateway saw before is not taken back.
        self.counts.completed = self.counts.completed.max(self.answered + completed);
        self.counts.failed = self.counts.failed.max(errors + failed);
        if self.written == self.counts.total {
            (self.counts.completed, self.counts.failed) = (self.answered, errors);
        }
    }

    /// All lines are written: its files are made from now on.
    pub fn finalize(&mut self, now: i64) {
        if self.status == BatchStatus::InProgress && self.written == self.counts.total && !self.late {
            self.status = BatchStatus::Finalizing;
            self.times.finalizing_at = Some(now);
        }
    }

    /// Its files are made, and it ends.
    pub fn end(&mut self, (output, errors): (Option<String>, Option<String>), now: i64) {
        let (status, time) = match self.status {
            BatchStatus::Cancelling => (BatchStatus::Cancelled, &mut self.times.cancelled_at),
            BatchStatus::InProgress | BatchStatus::Finalizing if self.late => {
                (BatchStatus::Expired, &mut self.times.expired_at)
            }
            BatchStatus::InProgress | BatchStatus::Finalizing => {
                (BatchStatus::Completed, &mut self.times.completed_at)
            }
            _ => return,
        };
        self.status = status;
        *time = Some(now);
        (self.output_file_id, self.error_file_id) = (output, errors);
        self.ended(now);
    }

    fn ended(&mut self, now: i64) {
        if let Some(hook) = &mut self.webhook {
            hook.due_at = Some(now + WEBHOOK_PAUSES[0]);
        }
    }

    /// A try to tell of its end came out so.
    pub fn notified(&mut self, done: bool, now: i64) {
        if let Some(hook) = &mut self.webhook {
            hook.tries += 1;
            let pause = WEBHOOK_PAUSES.get(hook.tries as usize).filter(|_| !done);
            hook.due_at = pause.map(|seconds| now + seconds);
        }
    }

    /// OpenAI's object: every field, whether or not it has a value.
    pub fn object(&self) -> Value {
        let errors = (!self.errors.is_empty()).then(|| json!({"object": "list", "data": self.errors}));
        let times = &self.times;
        let usage = json!({
            "input_tokens": self.tokens.input, "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": self.tokens.output, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.tokens.input + self.tokens.output,
        });
        json!({
            "id": self.id, "object": "batch", "endpoint": self.endpoint, "model": self.model, "errors": errors,
            "input_file_id": self.input_file_id, "completion_window": self.completion_window,
            "status": self.status, "output_file_id": self.output_file_id, "error_file_id": self.error_file_id,
            "created_at": self.created_at, "in_progress_at": times.in_progress_at, "expires_at": self.expires_at,
            "finalizing_at": times.finalizing_at, "completed_at": times.completed_at,
            "failed_at": times.failed_at, "expired_at": times.expired_at,
            "cancelling_at": times.cancelling_at, "cancelled_at": times.cancelled_at,
            "request_counts": self.counts, "usage": usage, "metadata": self.metadata,
        })
    }
}

#[cfg(test)]
mod tests;
