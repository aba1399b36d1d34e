//! A job, decoded and checked: pure, no tokenizer, no clock.
//!
//! The body is one OpenAI request (chat completions or completions), or OpenAI batch lines when the
//! headers say so. A bad single request refuses the job; a bad batch line refuses that line alone.
//! Every refusal names field, value and limit, never text of a prompt, and nothing over a limit of this
//! module gets through.

mod chat;
mod fields;
mod params;
mod reject;
mod request;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};

use millrace_crds::job::{INPUT_BYTES_MAX, JOB_BYTES_MAX, JobHeaders, REQUESTS_MAX};
use serde_json::Value;

use crate::schedule::handle::Limits;
use crate::text::jinja::json;

pub use chat::part_text;
use fields::Fields;
pub use params::LOGIT_BIAS_MAX;
pub use reject::Reject;

/// Largest single request, as a job's body or as one line of many: parsed JSON takes up to 30 times the
/// memory of its text, so that this bounds a decode at about 120 MiB. Larger inputs come as lines.
pub const REQUEST_BYTES_MAX: usize = 4 << 20;
/// Most unknown fields that an outcome names.
pub const IGNORED_FIELDS_MAX: usize = 32;
/// Longest `custom_id`, in bytes.
pub const CUSTOM_ID_BYTES_MAX: usize = 512;

/// What a job may ask for. The numbers come from the engine; the rest are constants of this module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobLimits {
    /// Longest prompt plus output, in tokens.
    pub max_model_len: u32,
    /// Token ids must be below this.
    pub vocabulary: u32,
}

impl From<Limits> for JobLimits {
    fn from(limits: Limits) -> Self {
        Self { max_model_len: limits.max_model_len, vocabulary: limits.vocabulary }
    }
}

/// A decoded job.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// What its headers say.
    pub headers: JobHeaders,
    /// When it was published, in Unix seconds: the broker's timestamp of the message, so that each
    /// attempt answers with the same bytes.
    pub created: i64,
    /// Its requests, in order; exactly one unless the headers say lines.
    pub lines: Vec<RequestLine>,
    /// Unknown fields that were ignored, because the headers say so; sorted, at most [`IGNORED_FIELDS_MAX`].
    pub ignored_fields: Vec<String>,
}

/// One request of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestLine {
    /// Where it stands in the job.
    pub index: usize,
    /// `<job>` in a job of one request, `<job>-<index>` in a job of lines.
    pub id: String,
    /// The caller's id of it: the job id, or the line's own.
    pub custom_id: String,
    /// What is asked, or why it is refused.
    pub request: Result<TextRequest, Reject>,
}

/// One OpenAI request.
#[derive(Debug, Clone, PartialEq)]
pub struct TextRequest {
    /// What to continue.
    pub input: Input,
    /// How.
    pub params: Params,
}

/// What to continue.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// A conversation, rendered with the model's chat template.
    Chat(Chat),
    /// One prompt, or several that are answered in one response object.
    Prompts {
        /// At least one.
        prompts: Vec<PromptInput>,
        /// Whether the tokenizer adds its special tokens (such as the beginning of the sequence) to text.
        add_special_tokens: bool,
    },
}

/// A value as the request's JSON has it, so that no number loses a digit on its way to the template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Json(pub String);

/// A conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Chat {
    /// At least one message, each an object that was checked.
    pub messages: Vec<Json>,
    /// What the model may call, for the template.
    pub tools: Option<Json>,
    /// What the model may cite, for the template.
    pub documents: Option<Json>,
    /// Whether the template opens the assistant's turn. On unless asked otherwise.
    pub add_generation_prompt: bool,
    /// Whether the last message is continued instead of answered.
    pub continue_final_message: bool,
    /// Further variables of the template (`chat_template_kwargs`), an object.
    pub variables: Option<Json>,
}

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PromptInput {
    /// Text to tokenize.
    Text(String),
    /// Tokens as they are.
    Tokens(Vec<u32>),
}

/// How to continue. What is absent takes the model's own default (`generation_config.json`), then OpenAI's.
#[derive(Debug, Clone, PartialEq)]
pub struct Params {
    /// Choices per prompt.
    pub n: u32,
    /// Most tokens per choice; 0 where the prompt alone is asked about. Absent, a chat may fill the context and a
    /// completion gets 16, as in vLLM.
    pub max_tokens: Option<u32>,
    /// Texts that end a choice; they are cut off.
    pub stop: Vec<String>,
    /// Keep the stop text that ended the choice.
    pub include_stop: bool,
    /// Tokens that end a choice, beside the model's own.
    pub stop_token_ids: Vec<u32>,
    /// The model's end of sequence does not end a choice.
    pub ignore_eos: bool,
    /// Special tokens leave no text. On unless asked otherwise.
    pub skip_special_tokens: bool,
    /// The caller's seed; without one it follows from the job's id.
    pub seed: Option<u64>,
    /// Report the chosen token's log probability and those of this many most probable ones.
    pub logprobs: Option<u32>,
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Most probable k; 0 is off.
    pub top_k: Option<u32>,
    /// Least share of the most probable token's probability.
    pub min_p: Option<f32>,
    /// 1 is off.
    pub repetition_penalty: Option<f32>,
    /// 0 is off.
    pub presence_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens, in the order of their ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Nothing ends a choice before it has so many tokens.
    pub min_tokens: u32,
    /// Texts that are never generated.
    pub bad_words: Vec<String>,
    /// The only tokens that are generated, if any are named.
    pub allowed_token_ids: Vec<u32>,
    /// Most tokens of the prompt; the last ones are kept.
    pub truncate_prompt_tokens: Option<u32>,
    /// Report the log probability of each token of the prompt and those of this many most probable ones.
    pub prompt_logprobs: Option<u32>,
    /// The text begins with the prompt's; in a chat with that of the last message, where the answer continues its role.
    pub echo: bool,
    /// Log probabilities name tokens by their ids.
    pub tokens_as_ids: bool,
    /// Special tokens that stand in a caller's text are text.
    pub split_special_tokens: Option<bool>,
}

impl Job {
    /// Decodes a job's body. `created` is the broker's timestamp of the message, in Unix seconds.
    ///
    /// # Errors
    /// When the job as a whole is refused: too large, a malformed single request, no line, too many lines.
    pub fn decode(headers: JobHeaders, created: i64, body: &[u8], limits: &JobLimits) -> Result<Job, Reject> {
        let bytes_max = match (&headers.input, headers.jsonl) {
            (Some(_), true) => INPUT_BYTES_MAX,
            (Some(_), false) => REQUEST_BYTES_MAX as u64,
            (None, _) => JOB_BYTES_MAX as u64,
        };
        check_bytes("body", body, bytes_max)?;
        let body = without_mark("body", body)?;
        let id = headers.id.as_str();
        let reading = Reading::new(limits, headers.ignore_unknown);
        let lines = if headers.jsonl {
            decode_lines(id, body, &reading)?
        } else {
            let (value, text) = parse_json("body", body)?;
            let request = TextRequest::decode(value, text, None, &reading)?;
            vec![RequestLine { index: 0, id: id.to_owned(), custom_id: id.to_owned(), request: Ok(request) }]
        };
        Ok(Job { headers, created, lines, ignored_fields: reading.ignored() })
    }

    /// Sequences that the job needs in all: prompts times choices.
    pub fn sequences(&self) -> usize {
        self.lines.iter().filter_map(|line| line.request.as_ref().ok()).map(TextRequest::sequences).sum()
    }
}

impl TextRequest {
    /// Sequences that the request needs: prompts times choices.
    pub fn sequences(&self) -> usize {
        let prompts = match &self.input {
            Input::Chat(_) => 1,
            Input::Prompts { prompts, .. } => prompts.len(),
        };
        prompts * self.params.n as usize
    }
}

impl RequestLine {
    /// Decodes one line: an OpenAI batch line, or a request alone, whose `custom_id` is then its `id`.
    /// A bad line is a line with a refusal.
    pub fn decode(index: usize, id: String, bytes: &[u8], limits: &JobLimits) -> RequestLine {
        let reading = Reading::new(limits, false);
        Self::read(index, id, bytes, &reading)
    }

    fn read(index: usize, id: String, bytes: &[u8], reading: &Reading<'_>) -> RequestLine {
        let mut custom_id = id.clone();
        // Files that were joined have marks between them.
        let bytes = without_mark("line", bytes);
        let request = bytes.and_then(|bytes| decode_line(bytes, &mut custom_id, reading));
        RequestLine { index, id, custom_id, request }
    }
}

/// What requests are read with.
struct Reading<'a> {
    limits: &'a JobLimits,
    /// Unknown fields so far, where they are ignored.
    ignored: Option<RefCell<BTreeSet<String>>>,
}

impl<'a> Reading<'a> {
    fn new(limits: &'a JobLimits, ignore: bool) -> Self {
        Self { limits, ignored: ignore.then(RefCell::default) }
    }

    /// Ignores an unknown field; returns whether that is allowed.
    fn ignores(&self, field: &str) -> bool {
        let Some(ignored) = &self.ignored else { return false };
        let mut ignored = ignored.borrow_mut();
        if ignored.len() < IGNORED_FIELDS_MAX {
            ignored.insert(field.to_owned());
        }
        true
    }

    fn ignored(self) -> Vec<String> {
        self.ignored.map(|ignored| ignored.into_inner().into_iter().collect()).unwrap_or_default()
    }
}

/// A file's bytes behind the byte order mark that editors of Windows write.
fn without_mark<'a>(field: &'static str, bytes: &'a [u8]) -> Result<&'a [u8], Reject> {
    if bytes.starts_with(&[0xFF, 0xFE]) || bytes.starts_with(&[0xFE, 0xFF]) {
        return Err(Reject::NotJson { field, error: "it is UTF-16; write it as UTF-8".into() });
    }
    Ok(bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes))
}

/// Whether a line of JSON lines holds nothing.
pub fn is_blank(line: &[u8]) -> bool {
    line.iter().all(u8::is_ascii_whitespace)
}

fn decode_lines(job: &str, body: &[u8], reading: &Reading<'_>) -> Result<Vec<RequestLine>, Reject> {
    let mut lines = Vec::new();
    let mut first_with: HashMap<String, usize> = HashMap::new();
    for bytes in body.split(|&byte| byte == b'\n').filter(|line| !is_blank(line)) {
        let index = lines.len();
        if index == REQUESTS_MAX {
            return Err(Reject::TooMany { field: "body".into(), what: "requests", limit: REQUESTS_MAX });
        }
        let mut line = RequestLine::read(index, format!("{job}-{index}"), bytes, reading);
        match first_with.get(&line.custom_id) {
            Some(&first) => {
                line.request = Err(Reject::Duplicate { custom_id: line.custom_id.clone(), first });
            }
            None => {
                first_with.insert(line.custom_id.clone(), index);
            }
        }
        lines.push(line);
    }
    if lines.is_empty() {
        return Err(Reject::Missing { field: "body".into(), expected: "at least 1 line with a request" });
    }
    Ok(lines)
}

fn decode_line(bytes: &[u8], custom_id: &mut String, reading: &Reading<'_>) -> Result<TextRequest, Reject> {
    check_bytes("line", bytes, REQUEST_BYTES_MAX as u64)?;
    let (value, text) = parse_json("line", bytes)?;
    let envelope = ["custom_id", "method", "url", "body"];
    if !envelope.iter().any(|name| value.get(name).is_some()) {
        return TextRequest::decode(value, text, None, reading);
    }
    let mut fields = Fields::open("", value)?;
    *custom_id = fields.text("custom_id", 1..=CUSTOM_ID_BYTES_MAX)?.ok_or_else(|| Reject::Missing {
        field: "custom_id".into(),
        expected: "a string that is unique in the job",
    })?;
    fields.one_of("method", &["POST"])?;
    let url = fields.one_of("url", &millrace_crds::request::URLS)?;
    let body = fields.take("body").ok_or_else(|| Reject::Missing {
        field: "body".into(),
        expected: "a chat completions or completions request",
    })?;
    fields.done(reading)?;
    TextRequest::decode(body, json::field(text, "body").unwrap_or_default(), url, reading)
}

fn check_bytes(field: &'static str, bytes: &[u8], limit: u64) -> Result<(), Reject> {
    if bytes.len() as u64 > limit {
        return Err(Reject::TooLong { field: field.into(), bytes: bytes.len(), limit: limit as usize });
    }
    Ok(())
}

/// serde_json itself refuses more than 128 levels.
fn parse_json<'a>(field: &'static str, bytes: &'a [u8]) -> Result<(Value, &'a str), Reject> {
    let malformed = |error: String| Reject::NotJson { field, error };
    let value = serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
    let text = std::str::from_utf8(bytes).map_err(|error| malformed(error.to_string()))?;
    Ok((value, text))
}
