//! One OpenAI request body: a conversation or prompts, and the parameters.

use millrace_crds::request::is_chat;
use serde_json::Value;

use super::fields::{Fields, refuse_kind, text, token};
use super::{Input, JobLimits, PromptInput, Reading, Reject, TextRequest, chat, params};

/// Most prompts in one request, as in OpenAI's API; more come as lines.
pub const PROMPTS_MAX: usize = 2048;
/// Most sequences of one request, prompts times choices: its answer is one JSON object.
pub const SEQUENCES_MAX: usize = 4096;
/// Longest prompt or message. A request is not longer anyway; this is the limit that messages name.
pub(super) const TEXT_BYTES_MAX: usize = super::REQUEST_BYTES_MAX;

impl TextRequest {
    /// Decodes a request body, which is also there as `text`. `url` is the endpoint that a batch line names, if any.
    pub(super) fn decode(
        body: Value,
        text: &str,
        url: Option<&str>,
        reading: &Reading<'_>,
    ) -> Result<Self, Reject> {
        let mut fields = Fields::open("", body)?;
        let chat = match (fields.has("messages"), fields.has("prompt"), url.map(is_chat)) {
            (true, true, _) => {
                return Err(Reject::Unsupported { field: "prompt".into(), reason: "messages is there too" });
            }
            (true, false, None | Some(true)) => true,
            (false, true, None | Some(false)) => false,
            (_, _, Some(true)) => {
                return Err(Reject::Missing { field: "messages".into(), expected: "an array of messages" });
            }
            (_, _, Some(false)) => {
                let expected = "a string, or an array of strings or token ids";
                return Err(Reject::Missing { field: "prompt".into(), expected });
            }
            (false, false, None) => {
                let expected = "an array of messages, or send a prompt";
                return Err(Reject::Missing { field: "messages".into(), expected });
            }
        };
        let params = params::read(&mut fields, chat, reading.limits)?;
        let input = if chat {
            chat::read(&mut fields, text, reading)?
        } else {
            read_prompts(&mut fields, reading.limits)?
        };
        fields.done(reading)?;
        let request = TextRequest { input, params };
        if request.sequences() > SEQUENCES_MAX {
            return Err(Reject::TooMany {
                field: "n".into(),
                what: "sequences (prompts times n)",
                limit: SEQUENCES_MAX,
            });
        }
        Ok(request)
    }
}

fn read_prompts(fields: &mut Fields, limits: &JobLimits) -> Result<Input, Reject> {
    let field = "prompt";
    let value = fields.take(field).unwrap_or(Value::Null);
    let prompts = match value {
        Value::Array(values) if values.first().is_some_and(Value::is_number) => {
            vec![PromptInput::Tokens(read_tokens(field, &values, limits)?)]
        }
        Value::Array(values) if values.is_empty() => {
            return Err(Reject::Missing { field: field.into(), expected: "at least 1 prompt" });
        }
        Value::Array(values) if values.len() > PROMPTS_MAX => {
            return Err(Reject::TooMany { field: field.into(), what: "prompts", limit: PROMPTS_MAX });
        }
        Value::Array(values) => values
            .into_iter()
            .enumerate()
            .map(|(i, value)| read_prompt(&format!("{field}[{i}]"), value, limits))
            .collect::<Result<Vec<_>, _>>()?,
        value => vec![read_prompt(field, value, limits)?],
    };
    let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(true);
    Ok(Input::Prompts { prompts, add_special_tokens })
}

fn read_prompt(field: &str, value: Value, limits: &JobLimits) -> Result<PromptInput, Reject> {
    match value {
        Value::Array(values) => Ok(PromptInput::Tokens(read_tokens(field, &values, limits)?)),
        value @ Value::String(_) => Ok(PromptInput::Text(text(field, value, 0..=TEXT_BYTES_MAX)?)),
        other => Err(refuse_kind(field.to_owned(), &other, "a string or an array of token ids")),
    }
}

fn read_tokens(field: &str, values: &[Value], limits: &JobLimits) -> Result<Vec<u32>, Reject> {
    if values.is_empty() {
        return Err(Reject::Missing { field: field.to_owned(), expected: "at least 1 token id" });
    }
    if values.len() > limits.max_model_len as usize {
        return Err(Reject::TooMany {
            field: field.to_owned(),
            what: "tokens (the model's length)",
            limit: limits.max_model_len as usize,
        });
    }
    let id = |(i, value)| token(&format!("{field}[{i}]"), value, limits.vocabulary);
    values.iter().enumerate().map(id).collect()
}
