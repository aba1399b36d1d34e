//! Answers: finished choices to OpenAI response objects, and those to the bytes of an outcome.
//!
//! Nothing here depends on time, cache or attempt: equal choices give equal bytes.

use bytes::Bytes;
use millrace_crds::request::{
    ChatChoice, ChatCompletion, ChatLogprobs, ChatMessage, ChatTokenLogprob, FinishReason, TextChoice,
    TextCompletion, TextLogprobs, TopLogprob, Usage,
};
use millrace_crds::result::{ErrorCode, LineError, OutputLine, Response};
use serde_json::Value;

use crate::text::detokenize::Pieces;
use crate::text::job::{Input, RequestLine, TextRequest};
use crate::text::prompt::Text;

/// A job's answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// The outcome's body: one `crds::result::OutputLine`, or one a line for a job of lines. Equal for each
    /// attempt of the job.
    pub body: Bytes,
    /// Requests answered.
    pub answered: usize,
    /// Requests that have an error line instead.
    pub refused: usize,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Tokens generated, as far as they count.
    pub output_tokens: u64,
    /// Choices that ended by themselves or at a stop; the others reached their length.
    pub stopped: u64,
    /// From the start of the job to its first token; it is not part of the body.
    pub first_token_ms: Option<f64>,
}

/// A finished choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Its text, cut before the stop string.
    pub text: String,
    /// Why it ended.
    pub finish: FinishReason,
    /// Tokens that count: up to and including the one that ended it.
    pub tokens: u64,
    /// One entry for each token, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
}

/// Log probabilities at one token of a choice.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub id: u32,
    /// Characters of text before it.
    pub offset: usize,
    /// The token's, and those of the most probable tokens.
    pub values: crate::schedule::request::Logprobs,
}

/// The answer to one request.
pub fn answer(line: &RequestLine, request: &TextRequest, answered: &Answered<'_>) -> OutputLine {
    let body = match request.input {
        Input::Chat(_) => serde_json::to_value(answered.chat(&line.id)),
        Input::Prompts { .. } => serde_json::to_value(answered.completion(&line.id)),
    };
    OutputLine {
        id: line.id.clone(),
        custom_id: line.custom_id.clone(),
        response: Some(Response {
            status_code: 200,
            request_id: line.id.clone(),
            // Strings and finite numbers always have a JSON form.
            body: body.unwrap_or(Value::Null),
        }),
        error: None,
    }
}

/// The line that stands for a request without an answer.
pub fn refusal(id: &str, custom_id: &str, code: ErrorCode, message: String) -> OutputLine {
    OutputLine {
        id: id.to_owned(),
        custom_id: custom_id.to_owned(),
        response: None,
        error: Some(LineError { code, message }),
    }
}

/// A line as it stands in the outcome, without a line feed.
pub fn to_json(line: &OutputLine) -> Vec<u8> {
    serde_json::to_vec(line).unwrap_or_default()
}

/// The parts of an answer.
pub struct Answered<'a> {
    /// The text side of the model.
    pub text: &'a Text,
    /// The answer's timestamp, in seconds of the Unix epoch.
    pub created: i64,
    /// Whether log probabilities were asked for.
    pub logprobs: bool,
    /// Tokens of all prompts.
    pub prompt_tokens: u64,
    /// Each choice of each prompt, in order.
    pub choices: Vec<Choice>,
}

impl Answered<'_> {
    /// Tokens of all choices.
    pub fn output_tokens(&self) -> u64 {
        self.choices.iter().map(|choice| choice.tokens).sum()
    }

    /// Choices that ended before their length.
    pub fn stopped(&self) -> u64 {
        self.choices.iter().filter(|choice| choice.finish == FinishReason::Stop).count() as u64
    }

    fn usage(&self) -> Usage {
        let completion_tokens = self.output_tokens();
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens,
            total_tokens: self.prompt_tokens + completion_tokens,
        }
    }

    fn chat(&self, id: &str) -> ChatCompletion {
        let pieces = self.text.pieces();
        let choice = |(index, choice): (u32, &Choice)| ChatChoice {
            index,
            message: ChatMessage { role: "assistant".into(), content: choice.text.clone() },
            logprobs: self.logprobs.then(|| ChatLogprobs {
                content: choice.logprobs.iter().map(|at| chat_logprob(at, pieces)).collect(),
            }),
            finish_reason: choice.finish,
        };
        ChatCompletion {
            id: format!("chatcmpl-{id}"),
            object: "chat.completion".into(),
            created: self.created,
            model: self.text.model().to_owned(),
            choices: (0..).zip(&self.choices).map(choice).collect(),
            usage: self.usage(),
        }
    }

    fn completion(&self, id: &str) -> TextCompletion {
        let pieces = self.text.pieces();
        let choice = |(index, choice): (u32, &Choice)| TextChoice {
            index,
            text: choice.text.clone(),
            logprobs: self.logprobs.then(|| text_logprobs(&choice.logprobs, pieces)),
            finish_reason: choice.finish,
        };
        TextCompletion {
            id: format!("cmpl-{id}"),
            object: "text_completion".into(),
            created: self.created,
            model: self.text.model().to_owned(),
            choices: (0..).zip(&self.choices).map(choice).collect(),
            usage: self.usage(),
        }
    }
}

fn text_of(pieces: &Pieces, id: u32) -> String {
    String::from_utf8_lossy(pieces.bytes(id)).into_owned()
}

/// JSON has no infinity: a token of probability 0 gets -9999, as in OpenAI's API. The shortest decimal form
/// of the 32-bit number is kept, which a cast would lengthen.
fn logprob(value: f32) -> f64 {
    format!("{}", value.max(-9999.0)).parse().unwrap_or(-9999.0)
}

fn chat_logprob(at: &TokenLogprobs, pieces: &Pieces) -> ChatTokenLogprob {
    let top = |&(id, value): &(u32, f32)| TopLogprob {
        token: text_of(pieces, id),
        logprob: logprob(value),
        bytes: pieces.bytes(id).to_vec(),
    };
    ChatTokenLogprob {
        token: text_of(pieces, at.id),
        logprob: logprob(at.values.chosen),
        bytes: pieces.bytes(at.id).to_vec(),
        top_logprobs: at.values.top.iter().map(top).collect(),
    }
}

fn text_logprobs(tokens: &[TokenLogprobs], pieces: &Pieces) -> TextLogprobs {
    let top = |at: &TokenLogprobs| {
        let entry = |&(id, value): &(u32, f32)| (text_of(pieces, id), Value::from(logprob(value)));
        at.values.top.iter().map(entry).collect()
    };
    TextLogprobs {
        text_offset: tokens.iter().map(|at| at.offset).collect(),
        token_logprobs: tokens.iter().map(|at| logprob(at.values.chosen)).collect(),
        tokens: tokens.iter().map(|at| text_of(pieces, at.id)).collect(),
        top_logprobs: tokens.iter().map(top).collect(),
    }
}
