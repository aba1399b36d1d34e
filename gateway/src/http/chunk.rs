//! The chunks of a streamed answer, in the only form that all of OpenAI's clients accept: a line `data: JSON` and an
//! empty line, comments to keep the connection alive, `[DONE]` at the end. No `id:`, `event:` or `retry:` lines.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use millrace_crds::names::JobId;
use millrace_crds::tokens::TokenDelta;
use serde_json::{Value, json};

use crate::http::error::{ApiCode, ApiError};
use crate::http::inference::Endpoint;
use crate::live::{LiveText, StreamEnd};

/// Keeps a connection alive.
pub const PING: Bytes = Bytes::from_static(b": ping\n\n");
/// Ends a stream.
pub const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// One event.
pub fn event(value: &Value) -> Bytes {
    format!("data: {value}\n\n").into()
}

/// What all chunks of one answer have in common.
#[derive(Debug, Clone)]
pub struct ChunkForm {
    /// The job.
    pub id: JobId,
    /// When it was asked for, in Unix seconds.
    pub created: i64,
    /// The model's name.
    pub model: String,
    /// Which form.
    pub endpoint: Endpoint,
    /// Whether a last chunk shall say what it cost.
    pub include_usage: bool,
}

impl ChunkForm {
    fn chunk(&self, choices: Value, usage: Option<&Value>) -> Value {
        let (prefix, object) = match self.endpoint {
            Endpoint::Chat => ("chatcmpl", "chat.completion.chunk"),
            Endpoint::Completions => ("cmpl", "text_completion"),
        };
        let mut chunk = json!({
            "id": format!("{prefix}-{}", self.id), "object": object, "created": self.created, "model": self.model,
            "choices": choices,
        });
        if self.include_usage {
            chunk["usage"] = usage.cloned().unwrap_or(Value::Null);
        }
        chunk
    }

    fn role(&self, index: u32) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
        (self.endpoint == Endpoint::Chat).then(|| self.chunk(json!([choice]), None))
    }

    fn text(&self, index: u32, text: &str) -> Value {
        let choice = match self.endpoint {
            Endpoint::Chat => {
                json!({"index": index, "delta": {"content": text}, "logprobs": null, "finish_reason": null})
            }
            Endpoint::Completions => {
                json!({"index": index, "text": text, "logprobs": null, "finish_reason": null})
            }
        };
        self.chunk(json!([choice]), None)
    }

    /// The last chunk of a choice: why it ended, and its log probabilities, which come with the outcome alone.
    fn end(&self, index: u32, choice: &Value) -> Value {
        let (reason, logprobs) = (&choice["finish_reason"], &choice["logprobs"]);
        let choice = match self.endpoint {
            Endpoint::Chat => {
                json!({"index": index, "delta": {}, "logprobs": logprobs, "finish_reason": reason})
            }
            Endpoint::Completions => {
                json!({"index": index, "text": "", "logprobs": logprobs, "finish_reason": reason})
            }
        };
        self.chunk(json!([choice]), None)
    }

    fn usage(&self, usage: &Value) -> Value {
        self.chunk(json!([]), Some(usage))
    }
}

/// A streamed answer: deltas in, chunks out, and the stored outcome has the last word. Pure.
#[derive(Debug)]
pub struct ChunkWriter {
    form: ChunkForm,
    n: u32,
    choices: BTreeMap<u32, LiveText>,
    begun: BTreeSet<u32>,
}

/// How a stream ends.
#[derive(Debug)]
pub struct ChunkEnd {
    /// The chunks that are missing.
    pub chunks: Vec<Value>,
    /// Whether the outcome gave text that no delta had brought.
    pub healed: bool,
}

impl ChunkWriter {
    /// For a request with `n` choices for each prompt.
    pub fn new(form: ChunkForm, n: u32) -> Self {
        Self { form, n, choices: BTreeMap::new(), begun: BTreeSet::new() }
    }

    /// Takes a delta; gives what it adds.
    pub fn take(&mut self, attempt: u64, delta: TokenDelta) -> Vec<Value> {
        let index = delta.request.saturating_mul(self.n).saturating_add(delta.choice);
        let text = self.choices.entry(index).or_default().take(attempt, delta);
        let mut chunks = Vec::new();
        if !text.is_empty() {
            chunks.extend(self.begin(index));
            chunks.push(self.form.text(index, &text));
        }
        chunks
    }

    fn begin(&mut self, index: u32) -> Option<Value> {
        if self.begun.insert(index) { self.form.role(index) } else { None }
    }

    /// Ends with the stored answer.
    ///
    /// # Errors
    /// [`ApiCode::StreamDiverged`] when what was sent is not how the answer begins: it cannot be taken back.
    pub fn end(&mut self, answer: &Value) -> Result<ChunkEnd, ApiError> {
        let mut end = ChunkEnd { chunks: Vec::new(), healed: false };
        for choice in answer["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().and_then(|index| index.try_into().ok()).unwrap_or(0);
            let text = choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
            match self.choices.remove(&index).unwrap_or_default().end(text) {
                StreamEnd::Rest(rest) => {
                    end.chunks.extend(self.begin(index));
                    if !rest.is_empty() {
                        end.healed = true;
                        end.chunks.push(self.form.text(index, &rest));
                    }
                }
                StreamEnd::Whole(_) => {
                    let message = "what was streamed is not how the stored answer begins; ask again";
                    return Err(ApiError::new(ApiCode::StreamDiverged, message));
                }
            }
            end.chunks.push(self.form.end(index, choice));
        }
        if self.form.include_usage {
            end.chunks.push(self.form.usage(&answer["usage"]));
        }
        Ok(end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn writer(endpoint: Endpoint, n: u32) -> ChunkWriter {
        let id = "req-1".parse().unwrap();
        let form = ChunkForm { id, created: 7, model: "m".into(), endpoint, include_usage: true };
        ChunkWriter::new(form, n)
    }

    fn delta(request: u32, choice: u32, number: u64, text: &str) -> TokenDelta {
        TokenDelta { number, request, choice, text: text.into(), finish_reason: None }
    }

    fn chat(texts: &[&str]) -> Value {
        let choice = |(index, text): (usize, &&str)| {
            json!({"index": index, "message": {"role": "assistant", "content": text}, "logprobs": null,
                   "finish_reason": "stop"})
        };
        let choices: Vec<_> = texts.iter().enumerate().map(choice).collect();
        json!({"choices": choices, "usage": {"total_tokens": 3}})
    }

    fn spelled(chunks: &[Value], index: u64) -> String {
        let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
        let own = choices.filter(|choice| choice["index"] == index);
        own.filter_map(|choice| choice["delta"]["content"].as_str().or(choice["text"].as_str())).collect()
    }

    #[test]
    fn a_chat_in_the_clients_form() {
        let mut writer = writer(Endpoint::Chat, 1);
        let mut chunks = writer.take(1, delta(0, 0, 0, "hel"));
        chunks.extend(writer.take(1, delta(0, 0, 1, "lo")));
        let end = writer.end(&chat(&["hello"])).unwrap();
        assert!(!end.healed);
        chunks.extend(end.chunks);
        let deltas: Vec<_> = chunks.iter().map(|c| c["choices"][0]["delta"].clone()).collect();
        let role = json!({"role": "assistant", "content": ""});
        let expected = [role, json!({"content": "hel"}), json!({"content": "lo"}), json!({}), Value::Null];
        assert_eq!(deltas, expected);
        for chunk in &chunks {
            assert_eq!(chunk["object"], "chat.completion.chunk");
            assert_eq!(chunk["id"], "chatcmpl-req-1");
        }
        assert_eq!(chunks[3]["choices"][0]["finish_reason"], "stop");
        // The helpers of both clients break on a usage chunk without an empty list.
        let last = &chunks[4];
        assert_eq!((&last["choices"], &last["usage"]["total_tokens"]), (&json!([]), &json!(3)));
        assert!(chunks[..4].iter().all(|chunk| chunk["usage"].is_null()));
    }

    #[test]
    fn choices_of_prompts_are_numbered_through() {
        let mut writer = writer(Endpoint::Completions, 2);
        let chunks = writer.take(1, delta(1, 1, 0, "x"));
        assert_eq!(chunks[0]["choices"][0]["index"], 3);
        assert_eq!(chunks.len(), 1, "a completion has no role");
    }

    #[test]
    fn what_cannot_be_taken_back_is_told() {
        let mut writer = writer(Endpoint::Chat, 1);
        writer.take(1, delta(0, 0, 0, "other"));
        assert_eq!(writer.end(&chat(&["text"])).unwrap_err().code, ApiCode::StreamDiverged);
    }

    proptest! {
        /// Whatever deltas are lost, repeated or late, what was sent is the stored text.
        #[test]
        fn the_concatenation_is_the_outcome(
            pieces in prop::collection::vec("[a-zé ]{0,4}", 0..20),
            order in prop::collection::vec((0usize..20, 1u64..3), 0..60),
        ) {
            let whole: String = pieces.concat();
            let mut writer = writer(Endpoint::Chat, 1);
            let mut chunks = Vec::new();
            for (at, attempt) in order {
                if let Some(piece) = pieces.get(at) {
                    chunks.extend(writer.take(attempt, delta(0, 0, at as u64, piece)));
                }
            }
            chunks.extend(writer.end(&chat(&[&whole])).unwrap().chunks);
            prop_assert_eq!(spelled(&chunks, 0), whole);
        }
    }
}
