//! A worker in this process that answers chats and completions from a script, in the form of a real one.
//!
//! What it does is said by the prompt's first word, the rest is the answer: `say`, `slow` (50 ms between the deltas),
//! `lose` (each second delta is lost), `mute` (no delta at all), `fail`, `refuse`, `hang`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use millrace_crds::result::{OutputLine, Response};
use millrace_crds::tokens::TokenDelta;
use millrace_engine::schedule::handle::{EngineLoad, Limits};
use millrace_queue::fault::Fault;
use millrace_worker::metrics::WorkerMetrics;
use millrace_worker::run::{Answer, Run, Work};
use millrace_worker::serve::serve;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::scripted::Bench;

/// Between two deltas of a slow answer.
const SLOW: Duration = Duration::from_millis(50);

/// What the runner did.
#[derive(Debug, Default)]
pub struct Chats {
    load: EngineLoad,
    /// Attempts begun.
    pub begun: AtomicU64,
    /// Attempts that were ended from outside.
    pub dropped: AtomicU64,
}

/// The runner.
#[derive(Debug, Clone, Default)]
pub struct ChatRunner(pub Arc<Chats>);

/// Counts an attempt that is dropped before its end.
struct Begun<'a>(&'a Chats, bool);

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        if !self.1 {
            self.0.dropped.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Serves in this process until it is dropped.
#[derive(Debug)]
pub struct ChatWorker {
    /// What it did.
    pub chats: Arc<Chats>,
    drain: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for ChatWorker {
    fn drop(&mut self) {
        self.drain.cancel();
    }
}

impl ChatWorker {
    /// A worker that serves already.
    ///
    /// # Errors
    /// When the broker does not do it.
    pub async fn start(bench: &Bench, name: &str) -> Result<Self> {
        let runner = ChatRunner::default();
        let line = bench.line(name, runner.clone(), Arc::new(WorkerMetrics::new(&bench.model))).await?;
        let drain = CancellationToken::new();
        let draining = drain.clone();
        let task = tokio::spawn(async move {
            // What ends it is the test's to judge.
            let _ = serve(&line, &draining, Duration::from_millis(100)).await;
        });
        Ok(Self { chats: runner.0, drain, task })
    }

    /// Ends it in the middle of what it does: jobs that it holds are neither answered nor handed back.
    pub fn kill(self) {
        self.task.abort();
    }
}

/// A body's last message or its prompt.
fn script_of(body: &Value) -> &str {
    let last = body["messages"].as_array().and_then(|messages| messages.last());
    last.map_or(&body["prompt"], |message| &message["content"]).as_str().unwrap_or_default()
}

/// A text in pieces, each a word with the space before it.
fn pieces(text: &str) -> Vec<&str> {
    let mut starts: Vec<usize> = text.match_indices(' ').map(|(at, _)| at).collect();
    starts.retain(|at| *at > 0);
    let ends = starts.iter().copied().chain([text.len()]);
    [0].into_iter().chain(starts.clone()).zip(ends).map(|(from, to)| &text[from..to]).collect()
}

/// The answer, in the form of a real worker.
fn line(work: &Work, body: &Value, text: &str) -> OutputLine {
    let (chat, id) = (body["messages"].is_array(), work.headers.id.to_string());
    let choice = |index: u64| match chat {
        true => json!({"index": index, "message": {"role": "assistant", "content": text}, "logprobs": null,
                       "finish_reason": "stop"}),
        false => json!({"index": index, "text": text, "logprobs": null, "finish_reason": "stop"}),
    };
    let choices: Vec<Value> = (0..body["n"].as_u64().unwrap_or(1)).map(choice).collect();
    let tokens = pieces(text).len() * choices.len();
    let (prefix, object) = if chat { ("chatcmpl", "chat.completion") } else { ("cmpl", "text_completion") };
    let answer = json!({
        "id": format!("{prefix}-{id}"), "object": object, "created": work.published.unix_timestamp(), "model": "m",
        "choices": choices,
        "usage": {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": tokens + 1},
    });
    let response = Some(Response { status_code: 200, request_id: id.clone(), body: answer });
    OutputLine { id: id.clone(), custom_id: id, response, error: None }
}

impl Run for ChatRunner {
    async fn run(&self, work: Work, deltas: Option<mpsc::Sender<TokenDelta>>) -> Result<Answer, Fault> {
        self.0.begun.fetch_add(1, Ordering::SeqCst);
        let mut begun = Begun(&self.0, false);
        let invalid = |message: &str| Fault::Invalid { message: message.to_owned() };
        let body: Value = serde_json::from_slice(&work.body).map_err(|_| invalid("the body is not JSON"))?;
        let (word, text) = script_of(&body).split_once(' ').unwrap_or((script_of(&body), ""));
        match word {
            "say" | "slow" | "lose" | "mute" => {}
            "fail" => {
                begun.1 = true;
                return Err(Fault::Inference { message: "scripted".into() });
            }
            "hang" => loop {
                tokio::time::sleep(Duration::from_millis(20)).await;
                self.0.load.steps.fetch_add(1, Ordering::SeqCst);
            },
            _ => {
                begun.1 = true;
                return Err(invalid("messages[0].content: \"?\" is not a script"));
            }
        }
        for (number, piece) in pieces(text).into_iter().enumerate() {
            if word == "slow" {
                tokio::time::sleep(SLOW).await;
            }
            self.0.load.steps.fetch_add(1, Ordering::SeqCst);
            let lost = word == "mute" || (word == "lose" && number % 2 == 1);
            let Some(deltas) = deltas.as_ref().filter(|_| !lost) else { continue };
            for choice in 0..body["n"].as_u64().unwrap_or(1) as u32 {
                let (number, text) = (number as u64, piece.to_owned());
                // What finds no room is lost, as it may be.
                let _ = deltas.try_send(TokenDelta { number, request: 0, choice, text, finish_reason: None });
            }
        }
        begun.1 = true;
        let line = line(&work, &body, text);
        Ok(Answer {
            body: serde_json::to_vec(&line).map_err(|error| invalid(&error.to_string()))?.into(),
            prompt_tokens: 1,
            output_tokens: 1,
            sequences: 1,
            stopped: 1,
            first_token_ms: None,
            ignored_fields: Vec::new(),
        })
    }

    fn limits(&self) -> Limits {
        Limits { max_model_len: 64, max_sequences: 64, block_tokens: 16, kv_blocks: 4096, vocabulary: 9 }
    }

    fn load(&self) -> &EngineLoad {
        &self.0.load
    }
}

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn pieces_are_the_text() {
        for (text, count) in [("a b  c", 4), ("", 1), (" x y", 2)] {
            assert_eq!((pieces(text).concat().as_str(), pieces(text).len()), (text, count));
        }
    }
}
