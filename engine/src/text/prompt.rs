//! Text to tokens: the tokenizer, chat template and defaults of a model's folder.
//!
//! The folder is in Hugging Face layout. Every file has a size limit; what is malformed is refused at the
//! start with the file's name, so that no job meets it. Rendering and tokenizing are pure.

mod folder;
#[cfg(test)]
mod tests;
#[cfg(any(test, feature = "testing"))]
pub mod tiny;

use std::path::Path;
use std::sync::Arc;

use tokenizers::Tokenizer;

use crate::schedule::handle::Limits;
use crate::schedule::request::{Refusal, Request, Sampling};
use crate::text::detokenize::{DecoderError, Detokenizer, Pieces};
use crate::text::job::{Input, Params, PromptInput, Reject, TextRequest};
use crate::text::template::{Template, TemplateError};

/// Tokens that a completion gets when its request names no limit, as in OpenAI's API and vLLM.
pub const COMPLETION_TOKENS_DEFAULT: u32 = 16;

/// What a model's folder says about text. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Text(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    model: String,
    tokenizer: Tokenizer,
    template: Option<Template>,
    pieces: Pieces,
    end_tokens: Vec<u32>,
    defaults: Defaults,
}

/// Sampling that the model's author recommends (`generation_config.json`), else OpenAI's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    /// 1 unless the folder says otherwise.
    pub temperature: f32,
    /// 1 unless the folder says otherwise.
    pub top_p: f32,
    /// Off unless the folder says otherwise.
    pub top_k: u32,
    /// Off unless the folder says otherwise.
    pub min_p: f32,
    /// Off unless the folder says otherwise.
    pub repetition_penalty: f32,
}

/// Why a model's folder was refused.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A file is missing or unreadable.
    #[error("{file}: {error}")]
    Read {
        /// The file.
        file: String,
        /// What the system says.
        error: std::io::Error,
    },
    /// A file is too large.
    #[error("{file}: {bytes} bytes exceed the limit of {limit}")]
    TooLarge {
        /// The file.
        file: String,
        /// Its size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// A file is not what it must be.
    #[error("{file}: {error}")]
    Malformed {
        /// The file.
        file: String,
        /// What is wrong.
        error: String,
    },
    /// The tokenizer's decoder is unknown.
    #[error("{file}: {error}")]
    Decoder {
        /// The file.
        file: String,
        /// What is wrong.
        error: DecoderError,
    },
    /// The chat template is refused.
    #[error("{file}: {error}")]
    Template {
        /// The file.
        file: String,
        /// What is wrong.
        error: TemplateError,
    },
}

/// A prompt in tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// The tokens, at least one.
    pub tokens: Vec<u32>,
}

impl Text {
    /// Loads the text side of a model folder. `model` is the name that answers carry.
    ///
    /// # Errors
    /// When a file is missing, malformed or over its limit.
    pub fn open(folder: &Path, model: &str) -> Result<Text, TextError> {
        folder::open(folder, model).map(|parts| Text(Arc::new(parts)))
    }

    /// The name that answers carry.
    pub fn model(&self) -> &str {
        &self.0.model
    }

    /// Tokens that end a sequence, from `generation_config.json`, `config.json` and the tokenizer.
    pub fn end_tokens(&self) -> &[u32] {
        &self.0.end_tokens
    }

    /// Sampling where a request leaves it open.
    pub fn defaults(&self) -> Defaults {
        self.0.defaults
    }

    /// Whether the model has a chat template.
    pub fn has_template(&self) -> bool {
        self.0.template.is_some()
    }

    /// The bytes of every token.
    pub fn pieces(&self) -> &Pieces {
        &self.0.pieces
    }

    /// Begins to decode a sequence.
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer<'_> {
        Detokenizer::new(&self.0.pieces, skip_special)
    }

    /// The text of a whole sequence, without its special tokens. Bytes that are no text show as U+FFFD.
    pub fn decode(&self, tokens: impl IntoIterator<Item = u32>) -> String {
        let (mut detokenizer, mut text) = (self.detokenizer(true), String::new());
        tokens.into_iter().for_each(|token| detokenizer.push(token, &mut text));
        detokenizer.finish(&mut text);
        text
    }

    /// Tokenizes text. With `special` the tokenizer adds its own tokens, such as the beginning of sequence.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, Reject> {
        let encoding = self.0.tokenizer.encode_fast(text, special);
        encoding
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| Reject::Tokenizer(error.to_string()))
    }

    /// The prompts of a request in a job that was published at `created` (Unix seconds).
    ///
    /// # Errors
    /// When the template refuses the conversation, or the tokenizer fails.
    pub fn prompts(&self, input: &Input, created: i64) -> Result<Vec<Prompt>, Reject> {
        match input {
            Input::Chat(chat) => {
                let template = self.0.template.as_ref().ok_or(Reject::NoTemplate)?;
                let rendered = template.render(chat, created)?;
                // The template has written the special tokens already.
                Ok(vec![Prompt { tokens: self.encode(&rendered, false)? }])
            }
            Input::Prompts { prompts, add_special_tokens } => {
                let prompt = |prompt: &PromptInput| match prompt {
                    PromptInput::Text(text) => self.encode(text, *add_special_tokens),
                    PromptInput::Tokens(tokens) => Ok(tokens.clone()),
                };
                prompts.iter().map(|p| prompt(p).map(|tokens| Prompt { tokens })).collect()
            }
        }
    }

    /// The engine's request for one choice of a prompt.
    ///
    /// # Errors
    /// When the engine can never run it; the refusal names value and limit.
    pub fn sequence(
        &self,
        request: &TextRequest,
        prompt: &Prompt,
        seed: u64,
        limits: &Limits,
    ) -> Result<Request, Refusal> {
        let params = &request.params;
        let max_tokens = params.max_tokens.unwrap_or_else(|| default_tokens(&request.input, prompt, limits));
        let sequence = Request {
            prompt: prompt.tokens.clone(),
            max_tokens,
            stop_tokens: self.stop_tokens(params),
            sampling: self.sampling(params),
            seed,
        };
        limits.admit(&sequence).map(|()| sequence)
    }

    /// Tokens that end a choice of a request.
    fn stop_tokens(&self, params: &Params) -> Vec<u32> {
        let end: &[u32] = if params.ignore_eos { &[] } else { &self.0.end_tokens };
        let mut tokens: Vec<u32> = end.iter().chain(&params.stop_token_ids).copied().collect();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    fn sampling(&self, params: &Params) -> Sampling {
        let defaults = self.0.defaults;
        Sampling {
            temperature: params.temperature.unwrap_or(defaults.temperature),
            top_p: params.top_p.unwrap_or(defaults.top_p),
            top_k: params.top_k.unwrap_or(defaults.top_k),
            min_p: params.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: params.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            logit_bias: params.logit_bias.clone(),
            logprobs: params.logprobs,
        }
    }
}

/// A chat may fill what the prompt leaves of the context (and of the cache, where that is smaller); a
/// completion gets [`COMPLETION_TOKENS_DEFAULT`]. At least 1, so that a prompt that fills all is refused with
/// both numbers.
fn default_tokens(input: &Input, prompt: &Prompt, limits: &Limits) -> u32 {
    let cache = u64::from(limits.kv_blocks) * u64::from(limits.block_tokens);
    let context = u64::from(limits.max_model_len).min(cache);
    let left = context.saturating_sub(prompt.tokens.len() as u64).max(1);
    let left = u32::try_from(left).unwrap_or(u32::MAX);
    match input {
        Input::Chat(_) => left,
        Input::Prompts { .. } => left.min(COMPLETION_TOKENS_DEFAULT),
    }
}
