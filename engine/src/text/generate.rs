//! One job through the engine: its requests become sequences, their tokens text, the text an answer.
//!
//! Dropping the future cancels every sequence. The answer depends on the job, the model and the engine's
//! sizes alone, not on time, neighbours or the attempt: seeds follow from the job's id, `created` is the
//! job's own timestamp, and tokens behind a stop string do not count however many the engine made.

mod choice;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use futures::stream::{self, StreamExt, TryStreamExt};
use millrace_crds::result::{ErrorCode, OutputLine};
use millrace_crds::tokens::TokenDelta;
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, mpsc};

use crate::schedule::handle::EngineHandle;
use crate::schedule::request::Refusal;
use crate::text::completion::{Answered, Choice, Completion, answer, refusal, to_json};
use crate::text::job::{Input, Job, PromptInput, Reject, RequestLine, TextRequest};
use crate::text::prompt::{Prompt, Text};
use choice::{Deltas, listen};

/// Sequences of one job that are submitted at once, in multiples of what the engine runs at once: as many
/// wait as run, so that no place stays empty, and other jobs' sequences do not wait behind thousands.
const SEQUENCES_AHEAD: usize = 2;
/// Lines that may be begun beyond the first unfinished one, in multiples of the same: answers are kept until
/// those before them are done, so that this bounds memory, and a long answer does not idle the engine.
const LINES_AHEAD: usize = 8;
/// Largest outcome body. Larger answers could not be uploaded in one piece on small machines.
const ANSWER_BYTES_MAX: usize = 1 << 30;
/// Prompts of more bytes are tokenized on a thread of their own: a mebibyte takes about a second.
const INLINE_PROMPT_BYTES_MAX: usize = 16 << 10;

/// Why a job has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
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

impl AnswerError {
    /// The code of an outcome or error line that carries this fault.
    pub fn code(&self) -> ErrorCode {
        match self {
            AnswerError::Reject(reject) => reject.code(),
            AnswerError::Sequence(_) => ErrorCode::InferenceError,
            AnswerError::Stopped => ErrorCode::WorkerLost,
        }
    }
}

/// Runs a job. Deltas are sent without waiting: a receiver that is slow gets fewer and longer ones.
///
/// # Errors
/// In a job of lines, a line's own fault becomes its error line; only [`AnswerError::Stopped`] and an answer that
/// is too long end the job.
pub async fn generate(
    job: Job,
    text: &Text,
    engine: &EngineHandle,
    deltas: Option<mpsc::Sender<TokenDelta>>,
) -> Result<Completion, AnswerError> {
    let requests = Requests::new(text, engine, deltas);
    let mut body = Vec::new();
    let mut totals = Totals::default();
    if job.headers.jsonl {
        let mut answers = requests.answer_in_order(stream::iter(job.lines), job.created);
        while let Some(answered) = answers.try_next().await? {
            totals.add(&answered);
            body.extend_from_slice(&to_json(&answered.line));
            body.push(b'\n');
            if body.len() > ANSWER_BYTES_MAX {
                return Err(Reject::AnswerTooLong { limit: ANSWER_BYTES_MAX }.into());
            }
        }
    } else if let Some(line) = job.lines.first() {
        let answered = requests.answer(line, job.created).await?;
        totals.add(&answered);
        body = to_json(&answered.line);
    }
    Ok(Completion {
        body: body.into(),
        answered: totals.answered,
        refused: totals.refused,
        prompt_tokens: totals.prompt_tokens,
        output_tokens: totals.output_tokens,
        stopped: totals.stopped,
        first_token_ms: requests.first_token_ms(),
    })
}

/// What several answers cost together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests with an answer.
    pub answered: usize,
    /// Requests with an error line.
    pub refused: usize,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Choices that ended before their length.
    pub stopped: u64,
}

impl Totals {
    /// Counts one more answer.
    pub fn add(&mut self, answer: &LineAnswer) {
        self.answered += usize::from(answer.line.error.is_none());
        self.refused += usize::from(answer.line.error.is_some());
        self.prompt_tokens += answer.prompt_tokens;
        self.output_tokens += answer.output_tokens;
        self.stopped += answer.stopped;
    }
}

/// One request's line of the outcome, and what it cost.
#[derive(Debug)]
pub struct LineAnswer {
    /// The line.
    pub line: OutputLine,
    /// Tokens of its prompts.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Choices that ended before their length.
    pub stopped: u64,
}

/// Answers requests of one job or file, with bounded numbers of sequences and lines in flight.
pub struct Requests<'a> {
    text: &'a Text,
    engine: &'a EngineHandle,
    places: Semaphore,
    lines_ahead: usize,
    deltas: Option<mpsc::Sender<TokenDelta>>,
    began: Instant,
    first_token_us: AtomicU64,
}

impl<'a> Requests<'a> {
    /// Of one job or file. Deltas are sent without waiting.
    pub fn new(text: &'a Text, engine: &'a EngineHandle, deltas: Option<mpsc::Sender<TokenDelta>>) -> Self {
        let width = engine.limits().max_sequences.max(1) as usize;
        Self {
            text,
            engine,
            places: Semaphore::new(width * SEQUENCES_AHEAD),
            lines_ahead: width * LINES_AHEAD,
            deltas,
            began: Instant::now(),
            first_token_us: AtomicU64::new(u64::MAX),
        }
    }

    /// Answers lines as they come, in their order. A line's own fault becomes its error line.
    pub fn answer_in_order<'b, L>(
        &'b self,
        lines: impl stream::Stream<Item = L> + 'b,
        created: i64,
    ) -> impl stream::Stream<Item = Result<LineAnswer, AnswerError>> + Unpin + 'b
    where
        L: std::borrow::Borrow<RequestLine> + 'b,
    {
        let answer = move |line: L| async move {
            let line = line.borrow();
            match self.answer(line, created).await {
                Err(fault @ (AnswerError::Reject(_) | AnswerError::Sequence(_))) => Ok(LineAnswer {
                    line: refusal(&line.id, &line.custom_id, fault.code(), fault.to_string()),
                    prompt_tokens: 0,
                    output_tokens: 0,
                    stopped: 0,
                }),
                other => other,
            }
        };
        Box::pin(lines.map(answer).buffered(self.lines_ahead))
    }

    /// Answers one request.
    ///
    /// # Errors
    /// The request's own fault, or that of the engine.
    pub async fn answer(&self, line: &RequestLine, created: i64) -> Result<LineAnswer, AnswerError> {
        let request = line.request.as_ref().map_err(|reject| AnswerError::Reject(reject.clone()))?;
        let prompts = self.prompts(request, created).await?;
        let prompt_tokens = prompts.iter().map(|prompt| prompt.tokens.len() as u64).sum();
        let n = request.params.n;
        let places: Vec<(usize, u32)> =
            (0..prompts.len()).flat_map(|prompt| (0..n).map(move |choice| (prompt, choice))).collect();
        let choices = places.into_iter().map(|place| self.choice(line, request, &prompts, place));
        let choices = futures::future::try_join_all(choices).await?;
        let answered = Answered { text: self.text, created, params: &request.params, prompt_tokens, choices };
        Ok(LineAnswer {
            output_tokens: answered.output_tokens(),
            stopped: answered.stopped(),
            prompt_tokens,
            line: answer(line, request, &answered),
        })
    }

    /// From the beginning to the first token of all.
    pub fn first_token_ms(&self) -> Option<f64> {
        let us = self.first_token_us.load(Ordering::Relaxed);
        (us != u64::MAX).then_some(us as f64 / 1000.0)
    }

    async fn prompts(&self, request: &TextRequest, created: i64) -> Result<Vec<Prompt>, AnswerError> {
        if text_bytes(&request.input) <= INLINE_PROMPT_BYTES_MAX {
            return Ok(self.text.prompts(request, created)?);
        }
        let (text, request) = (self.text.clone(), request.clone());
        let work = tokio::task::spawn_blocking(move || text.prompts(&request, created));
        let prompts = work.await.map_err(|error| Reject::Tokenizer(error.to_string()))?;
        Ok(prompts?)
    }

    /// Runs one choice of one prompt.
    async fn choice(
        &self,
        line: &RequestLine,
        request: &TextRequest,
        prompts: &[Prompt],
        (prompt, choice): (usize, u32),
    ) -> Result<Choice, AnswerError> {
        let seed = seed(line, request.params.seed, prompt, choice);
        let refuse = |refusal| match refusal {
            Refusal::Stopped => AnswerError::Stopped,
            refusal => {
                AnswerError::Reject(Reject::Engine { field: field_of(&request.input, prompt), refusal })
            }
        };
        let params = &request.params;
        let scored =
            choice == 0 && (params.prompt_logprobs.is_some() || (params.echo && params.logprobs.is_some()));
        let limits = self.engine.limits();
        let sequence =
            self.text.sequence(request, &prompts[prompt], (seed, scored), &limits).map_err(refuse)?;
        let stop_tokens = sequence.stop_tokens.clone();
        // The semaphore is never closed.
        let _place = self.places.acquire().await.map_err(|_| AnswerError::Stopped)?;
        let mut generation = self.engine.submit(sequence).await.map_err(refuse)?;
        let index = prompt as u32 * request.params.n + choice;
        let deltas = Deltas::new(self.deltas.clone(), line.index, index);
        let mut state = choice::Progress::new(self.text, request, (stop_tokens, deltas));
        state.begin(&prompts[prompt].tokens, scored);
        let first_token = || {
            let us = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.first_token_us.fetch_min(us, Ordering::Relaxed);
        };
        listen(&mut generation, &mut state, first_token).await?;
        Ok(state.finish().await)
    }
}

/// The caller's seed serves the first choice of each prompt as it is, so that a request gives the same text
/// alone and in an array. The other choices', and all seeds of a request without one, are hashed from what
/// identifies them, so that every attempt of a job draws the same numbers.
fn seed(line: &RequestLine, given: Option<u64>, prompt: usize, choice: u32) -> u64 {
    let mut hash = Sha256::new();
    match given {
        Some(seed) if choice == 0 => return seed,
        Some(seed) => hash.update(seed.to_le_bytes()),
        None => {
            hash.update(line.id.as_bytes());
            hash.update([0]);
            hash.update((prompt as u64).to_le_bytes());
        }
    }
    hash.update(choice.to_le_bytes());
    let digest = hash.finalize();
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&digest[..8]);
    u64::from_le_bytes(bytes)
}

fn field_of(input: &Input, prompt: usize) -> String {
    match input {
        Input::Chat(_) => "messages".into(),
        Input::Prompts { prompts, .. } if prompts.len() == 1 => "prompt".into(),
        Input::Prompts { .. } => format!("prompt[{prompt}]"),
    }
}

fn text_bytes(input: &Input) -> usize {
    match input {
        Input::Chat(chat) => chat.messages.iter().map(|message| message.0.len()).sum(),
        Input::Prompts { prompts, .. } => prompts
            .iter()
            .map(|prompt| match prompt {
                PromptInput::Text(text) => text.len(),
                PromptInput::Tokens(_) => 0,
            })
            .sum(),
    }
}
