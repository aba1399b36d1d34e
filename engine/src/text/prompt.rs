//! Text to tokens: the tokenizer, chat template and defaults of a model's folder.
//!
//! The folder is in Hugging Face layout. Every file has a size limit; what is malformed is refused at the
//! start with the file's name, so that no job meets it. Rendering and tokenizing are pure.

mod class;
mod files;
mod folder;
mod plain;
#[cfg(test)]
mod tests;
#[cfg(any(test, feature = "testing"))]
pub mod tiny;
mod tokens;

use std::path::Path;
use std::sync::{Arc, OnceLock};

use tokenizers::Tokenizer;

use crate::schedule::handle::Limits;
use crate::schedule::request::{Refusal, Request, Sampling};
use crate::text::detokenize::{DecoderError, Detokenizer, Pieces};
use crate::text::job::{Chat, Input, LOGIT_BIAS_MAX, Params, PromptInput, Reject, TextRequest};
use crate::text::marks::{self, Marker};
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
    /// The tokenizer that takes special tokens in text for text; made when it is first wanted.
    splitting: OnceLock<Tokenizer>,
    /// Finds added tokens in callers' texts; made when it is first wanted.
    marker: OnceLock<Marker>,
    /// Whether the model's author wants that for all text.
    split: bool,
    /// Whether requests that say nothing want it for their own text.
    split_callers: bool,
    templates: Templates,
    pieces: Pieces,
    end_tokens: Vec<u32>,
    defaults: Defaults,
    notes: Vec<String>,
}

/// A model's chat templates.
#[derive(Debug, Default)]
struct Templates {
    default: Option<Template>,
    /// For conversations with tools.
    tool_use: Option<Template>,
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

/// Which special tokens in a prompt's text are taken for text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Split {
    /// None: text that reads like a special token is one.
    Nothing,
    /// Those that the caller wrote, and other added tokens there too.
    Callers,
    /// All, the template's own too, as transformers has it for `split_special_tokens` of tokenizer_config.json.
    Everything,
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
        Self::open_for(folder, model, false)
    }

    /// As [`Text::open`]; with `split_callers` a request that does not say `split_special_tokens` means `true`.
    ///
    /// # Errors
    /// As [`Text::open`].
    pub fn open_for(folder: &Path, model: &str, split_callers: bool) -> Result<Text, TextError> {
        folder::open(folder, model).map(|parts| Text(Arc::new(Parts { split_callers, ..parts })))
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

    /// What a user should know about the folder's text side though nothing is wrong, a sentence each.
    pub fn notes(&self) -> &[String] {
        &self.0.notes
    }

    /// Whether the model has a chat template.
    pub fn has_template(&self) -> bool {
        self.0.templates.default.is_some()
    }

    /// The bytes of every token.
    pub fn pieces(&self) -> &Pieces {
        &self.0.pieces
    }

    /// Begins to decode a sequence.
    pub fn detokenizer(&self, skip_special: bool) -> Detokenizer<'_> {
        Detokenizer::new(&self.0.pieces, skip_special)
    }

    /// Begins to decode what follows a prompt, whose text is appended to `out`.
    pub fn detokenizer_behind(
        &self,
        skip_special: bool,
        prompt: &[u32],
        out: &mut String,
    ) -> Detokenizer<'_> {
        Detokenizer::behind(&self.0.pieces, skip_special, prompt, out)
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
        self.encode_as(text, special, self.0.split)
    }

    fn encode_as(&self, text: &str, special: bool, split: bool) -> Result<Vec<u32>, Reject> {
        let tokenizer = if split {
            self.0.splitting.get_or_init(|| {
                let mut tokenizer = self.0.tokenizer.clone();
                tokenizer.set_encode_special_tokens(true);
                tokenizer
            })
        } else {
            &self.0.tokenizer
        };
        let encoding = tokenizer.encode_fast(text, special);
        encoding
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|error| Reject::Tokenizer(error.to_string()))
    }

    /// The prompts of a request in a job that was published at `created` (Unix seconds).
    ///
    /// # Errors
    /// When the template refuses the conversation, or the tokenizer fails.
    pub fn prompts(&self, request: &TextRequest, created: i64) -> Result<Vec<Prompt>, Reject> {
        let params = &request.params;
        let split = self.split_of(params);
        let mut prompts = match &request.input {
            Input::Chat(chat) => {
                let templates = &self.0.templates;
                let tools = templates.tool_use.as_ref().filter(|_| chat.tools.is_some());
                let template = tools.or(templates.default.as_ref()).ok_or(Reject::NoTemplate)?;
                // The template has written the special tokens already.
                vec![self.chat_tokens(template, chat, (created, split))?]
            }
            Input::Prompts { prompts, add_special_tokens } => {
                let prompt = |prompt: &PromptInput| match prompt {
                    PromptInput::Text(text) if split == Split::Callers => {
                        plain::encode(&self.0.tokenizer, text, *add_special_tokens)
                    }
                    PromptInput::Text(text) => {
                        self.encode_as(text, *add_special_tokens, split == Split::Everything)
                    }
                    PromptInput::Tokens(tokens) => Ok(tokens.clone()),
                };
                prompts.iter().map(prompt).collect::<Result<Vec<_>, _>>()?
            }
        };
        if let Some(most) = params.truncate_prompt_tokens {
            prompts
                .iter_mut()
                .for_each(|tokens| drop(tokens.drain(..tokens.len().saturating_sub(most as usize))));
        }
        Ok(prompts.into_iter().map(|tokens| Prompt { tokens }).collect())
    }

    /// Whose special tokens are text: the request decides, then the worker's setting, then the model's author.
    fn split_of(&self, params: &Params) -> Split {
        match params.split_special_tokens {
            Some(true) => Split::Callers,
            Some(false) => Split::Nothing,
            None if self.0.split_callers => Split::Callers,
            None if self.0.split => Split::Everything,
            None => Split::Nothing,
        }
    }

    /// A conversation in tokens.
    fn chat_tokens(
        &self,
        template: &Template,
        chat: &Chat,
        (created, split): (i64, Split),
    ) -> Result<Vec<u32>, Reject> {
        if split != Split::Callers {
            return self.encode_as(&template.render(chat, created)?, false, split == Split::Everything);
        }
        let marker = self.0.marker.get_or_init(|| plain::marker(&self.0.tokenizer));
        let rendered = template.render_marked(chat, created, Some(marker))?;
        let newline = self.encode_as("\n", false, false)?;
        let encode = |text: &str, is_callers: bool| match is_callers {
            true => plain::encode(&self.0.tokenizer, text, false),
            false => self.encode_as(text, false, false),
        };
        let mut tokens = Vec::new();
        for (at, (text, is_callers)) in marks::parts(&rendered).into_iter().enumerate() {
            // Some tokenizers put a space before every text; behind a line feed they put none.
            let behind = if at > 0 { encode(&format!("\n{text}"), is_callers)? } else { Vec::new() };
            match behind.strip_prefix(newline.as_slice()) {
                Some(rest) if at > 0 => tokens.extend_from_slice(rest),
                _ => tokens.extend(encode(&text, is_callers)?),
            }
        }
        Ok(tokens)
    }

    /// The engine's request for one choice of a prompt. With `scored` the prompt's own tokens are reported first, with
    /// their log probabilities: the engine takes the first one as prompt and is made to choose the others.
    ///
    /// # Errors
    /// When the engine can never run it; the refusal names value and limit.
    pub fn sequence(
        &self,
        request: &TextRequest,
        prompt: &Prompt,
        (seed, scored): (u64, bool),
        limits: &Limits,
    ) -> Result<Request, Refusal> {
        let params = &request.params;
        let max_tokens = params.max_tokens.unwrap_or_else(|| default_tokens(&request.input, prompt, limits));
        // The engine makes a token at least; where none is wanted, nobody takes it.
        let max_tokens = max_tokens.max(1);
        let mut stop_tokens = self.stop_tokens(params);
        // Configurations may name tokens of a larger vocabulary; they are never chosen.
        stop_tokens.retain(|&token| token < limits.vocabulary);
        let sampling = self.sampling(params)?;
        let mut sequence = Request { prompt: prompt.tokens.clone(), max_tokens, stop_tokens, sampling, seed };
        check_biases(&sequence, params)?;
        limits.admit(&sequence)?;
        if scored {
            sequence.sampling.forced = sequence.prompt.split_off(1);
            sequence.max_tokens += u32::try_from(sequence.sampling.forced.len()).unwrap_or(u32::MAX);
            sequence.sampling.logprobs = params.prompt_logprobs.max(params.logprobs);
        }
        Ok(sequence)
    }

    /// Tokens that end a choice of a request.
    fn stop_tokens(&self, params: &Params) -> Vec<u32> {
        let end: &[u32] = if params.ignore_eos { &[] } else { &self.0.end_tokens };
        let mut tokens: Vec<u32> = end.iter().chain(&params.stop_token_ids).copied().collect();
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    fn sampling(&self, params: &Params) -> Result<Sampling, Refusal> {
        let defaults = self.0.defaults;
        let mut logit_bias = params.logit_bias.clone();
        logit_bias.extend(params.allowed_token_ids.iter().map(|&token| (token, ALLOWANCE)));
        Ok(Sampling {
            temperature: params.temperature.unwrap_or(defaults.temperature),
            top_p: params.top_p.unwrap_or(defaults.top_p),
            top_k: params.top_k.unwrap_or(defaults.top_k),
            min_p: params.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: params.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            logit_bias,
            logprobs: params.logprobs,
            min_tokens: params.min_tokens,
            bad_words: self.bad_words(&params.bad_words)?,
            forced: Vec::new(),
        })
    }

    /// Each word in tokens, at the beginning of a text and within one, as vLLM has it.
    fn bad_words(&self, words: &[String]) -> Result<Vec<Vec<u32>>, Refusal> {
        let mut found = Vec::new();
        for word in words {
            let word = word.trim_start();
            let encode = |text: &str| {
                self.encode(text, false).ok().filter(|tokens| !tokens.is_empty()).ok_or_else(|| {
                    Refusal::Sampling {
                        field: "bad_words",
                        value: format!("{word:?}"),
                        expected: "a word with at least 1 token",
                    }
                })
            };
            let (bare, spaced) = (encode(word)?, encode(&format!(" {word}"))?);
            let differs = spaced[0] != bare[0] && spaced.len() == bare.len();
            found.push(bare);
            found.extend(differs.then_some(spaced));
        }
        Ok(found)
    }
}

/// Added to the logits of the tokens that alone are allowed. It exceeds the distance between any two logits of a
/// sound model, and leaves those of the allowed ones apart by 1 part in 8,192.
const ALLOWANCE: f32 = 1024.0;

/// Every bias costs an operation per step, and has a place on a GPU. Penalties that grow would undo an allowance.
fn check_biases(sequence: &Request, params: &Params) -> Result<(), Refusal> {
    let sampling = &sequence.sampling;
    let early = if sampling.min_tokens > 0 { sequence.stop_tokens.len() } else { 0 };
    let count = sampling.logit_bias.len() + sampling.bad_words.len() + early;
    if count > LOGIT_BIAS_MAX {
        return Err(Refusal::Sampling {
            field: "logit_bias",
            value: format!("{count} tokens"),
            expected: "at most 1024 with allowed_token_ids, bad_words and the stop tokens of min_tokens",
        });
    }
    if params.allowed_token_ids.is_empty() {
        return Ok(());
    }
    let penalties = [
        ("repetition_penalty", sampling.repetition_penalty, 1.0, "1 where allowed_token_ids is there"),
        ("frequency_penalty", sampling.frequency_penalty, 0.0, "0 where allowed_token_ids is there"),
    ];
    match penalties.into_iter().find(|(_, value, off, _)| value != off) {
        Some((field, value, _, expected)) => {
            Err(Refusal::Sampling { field, value: value.to_string(), expected })
        }
        None => Ok(()),
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
