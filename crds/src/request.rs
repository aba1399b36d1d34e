//! The JSON forms that callers see: OpenAI batch lines, chat completions and completions.
//!
//! Answers hold nothing that depends on time, cache or attempt: `created` is the job's own timestamp.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The `url` of a chat completions batch line.
pub const CHAT_COMPLETIONS: &str = "/v1/chat/completions";
/// The `url` of a completions batch line.
pub const COMPLETIONS: &str = "/v1/completions";

/// Every `url` of a batch line; Azure's have no version.
pub const URLS: [&str; 4] = [CHAT_COMPLETIONS, COMPLETIONS, "/chat/completions", "/completions"];

/// Whether a `url` is one of chat completions.
pub fn is_chat(url: &str) -> bool {
    url.ends_with("/chat/completions")
}

/// One OpenAI batch input line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchLine {
    /// The caller's id, unique in the job.
    pub custom_id: String,
    /// `POST`.
    pub method: String,
    /// [`CHAT_COMPLETIONS`] or [`COMPLETIONS`].
    pub url: String,
    /// The request.
    pub body: Value,
}

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model's end of sequence, a stop token or a stop string.
    Stop,
    /// The limit of tokens.
    #[default]
    Length,
}

/// What a request cost. A repeated prompt counts once per prompt, not per choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompts.
    pub prompt_tokens: u64,
    /// Tokens generated, up to and including the one that completed a stop string.
    pub completion_tokens: u64,
    /// Both together.
    pub total_tokens: u64,
}

/// The answer to a chat request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatCompletion {
    /// `chatcmpl-` and the line's id.
    pub id: String,
    /// `chat.completion`.
    pub object: String,
    /// When the job was published, in Unix seconds.
    pub created: i64,
    /// The name of the model that answered.
    pub model: String,
    /// As many as `n` says.
    pub choices: Vec<ChatChoice>,
    /// What it cost.
    pub usage: Usage,
    /// If asked for: for each token of the prompt, what vLLM reports of it; `null` for the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<Value>>,
}

/// One choice of a chat answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatChoice {
    /// From 0.
    pub index: u32,
    /// The answer.
    pub message: ChatMessage,
    /// If asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// A message that the model wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

/// Log probabilities of a chat choice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprobs {
    /// One for each token.
    pub content: Vec<ChatTokenLogprob>,
}

/// Log probability of one token and of the most probable ones in its place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatTokenLogprob {
    /// The token's text; bytes that are no text show as U+FFFD.
    pub token: String,
    /// Natural logarithm.
    pub logprob: f64,
    /// The token's bytes.
    pub bytes: Vec<u8>,
    /// The most probable tokens, most probable first.
    pub top_logprobs: Vec<TopLogprob>,
}

/// Log probability of one alternative.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopLogprob {
    /// The token's text.
    pub token: String,
    /// Natural logarithm.
    pub logprob: f64,
    /// The token's bytes.
    pub bytes: Vec<u8>,
}

/// The answer to a completions request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextCompletion {
    /// `cmpl-` and the line's id.
    pub id: String,
    /// `text_completion`.
    pub object: String,
    /// When the job was published, in Unix seconds.
    pub created: i64,
    /// The name of the model that answered.
    pub model: String,
    /// `n` for each prompt, in the prompts' order.
    pub choices: Vec<TextChoice>,
    /// What it cost.
    pub usage: Usage,
}

/// One choice of a completions answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextChoice {
    /// From 0; choices of prompt `p` are `p * n` to `p * n + n - 1`.
    pub index: u32,
    /// The text.
    pub text: String,
    /// If asked for.
    pub logprobs: Option<TextLogprobs>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// If asked for: for each token of the prompt, what vLLM reports of it; `null` for the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<Vec<Value>>,
}

/// Log probabilities of a completions choice: one entry for each token in each list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextLogprobs {
    /// Where the token's text begins, in characters of the choice's text.
    pub text_offset: Vec<usize>,
    /// Natural logarithms; `null` for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f64>>,
    /// The tokens' names: their texts, `bytes:` and escapes where they are none, `token_id:` and the id where two of
    /// one place have one text.
    pub tokens: Vec<String>,
    /// The logarithms of the most probable tokens and of the chosen one, most probable first; `null` for the first
    /// token of an echoed prompt.
    pub top_logprobs: Vec<Option<serde_json::Map<String, Value>>>,
}
