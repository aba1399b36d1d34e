//! Answers: finished choices to OpenAI response objects, and those to the bytes of an outcome.
//!
//! Nothing here depends on time, cache or attempt: equal choices give equal bytes.

use bytes::Bytes;
use millrace_crds::request::{
    ChatChoice, ChatCompletion, ChatMessage, FinishReason, TextChoice, TextCompletion, Usage,
};
use millrace_crds::result::{ErrorCode, LineError, OutputLine, Response};
use serde_json::Value;

use crate::text::job::{Input, Params, RequestLine, TextRequest};
use crate::text::logprobs;
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
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Choice {
    /// Its text, cut before the stop string.
    pub text: String,
    /// Why it ended.
    pub finish: FinishReason,
    /// Tokens that count: up to and including the one that ended it.
    pub tokens: u64,
    /// One entry for each token, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// One entry for each token of the prompt, where it is echoed or reported; with values, but for the first one, on
    /// the first choice of a prompt whose log probabilities are asked for.
    pub prompt: Vec<TokenLogprobs>,
}

/// Log probabilities at one token of a choice.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub id: u32,
    /// Characters of text before it.
    pub offset: usize,
    /// The token's, and those of the most probable tokens.
    pub values: Option<crate::schedule::request::Logprobs>,
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
    /// What was asked for.
    pub params: &'a Params,
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

    /// The first choice of the prompt that a choice belongs to: it has the prompt's values.
    fn first(&self, index: usize) -> &Choice {
        let n = self.params.n.max(1) as usize;
        &self.choices[index - index % n]
    }

    fn prompt_logprobs(&self, index: usize) -> Option<Vec<Value>> {
        let most = self.params.prompt_logprobs?;
        Some(logprobs::of_prompt(&self.first(index).prompt, most, self.text.pieces()))
    }

    fn chat(&self, id: &str) -> ChatCompletion {
        let namer = logprobs::Namer { pieces: self.text.pieces(), as_ids: self.params.tokens_as_ids };
        let choice = |(index, choice): (u32, &Choice)| ChatChoice {
            index,
            message: ChatMessage { role: "assistant".into(), content: choice.text.clone() },
            logprobs: self.params.logprobs.map(|_| logprobs::of_chat(&choice.logprobs, namer)),
            finish_reason: choice.finish,
        };
        ChatCompletion {
            id: format!("chatcmpl-{id}"),
            object: "chat.completion".into(),
            created: self.created,
            model: self.text.model().to_owned(),
            choices: (0..).zip(&self.choices).map(choice).collect(),
            usage: self.usage(),
            prompt_logprobs: if self.choices.is_empty() { None } else { self.prompt_logprobs(0) },
        }
    }

    fn completion(&self, id: &str) -> TextCompletion {
        let namer = logprobs::Namer { pieces: self.text.pieces(), as_ids: self.params.tokens_as_ids };
        let logprobs = |place: usize, choice: &Choice| {
            let most = self.params.logprobs?;
            let prompt = if self.params.echo { &self.first(place).prompt[..] } else { &[] };
            Some(logprobs::of_text(prompt.iter().chain(&choice.logprobs), most as usize, namer))
        };
        let choice = |(place, choice): (usize, &Choice)| TextChoice {
            index: u32::try_from(place).unwrap_or(u32::MAX),
            text: choice.text.clone(),
            logprobs: logprobs(place, choice),
            finish_reason: choice.finish,
            prompt_logprobs: self.prompt_logprobs(place),
        };
        TextCompletion {
            id: format!("cmpl-{id}"),
            object: "text_completion".into(),
            created: self.created,
            model: self.text.model().to_owned(),
            choices: self.choices.iter().enumerate().map(choice).collect(),
            usage: self.usage(),
        }
    }
}
