//! One OpenAI request body: a conversation or prompts, and the parameters.

use millrace_crds::request::{CHAT_COMPLETIONS, COMPLETIONS};
use serde_json::Value;

use super::fields::{Fields, refuse, refuse_kind, text, token};
use super::{Chat, Input, JobLimits, Message, PromptInput, Reject, TextRequest, params};

/// Most prompts in one request, as in OpenAI's API; more come as lines.
pub const PROMPTS_MAX: usize = 2048;
/// Most sequences of one request, prompts times choices: its answer is one JSON object.
pub const SEQUENCES_MAX: usize = 4096;
/// Most messages of a conversation: no model's context holds as many turns.
pub const MESSAGES_MAX: usize = 4096;
/// Most parts of one message.
const PARTS_MAX: usize = 256;
/// Most variables for the template.
const VARIABLES_MAX: usize = 32;
/// Longest name of a participant.
const NAME_BYTES_MAX: usize = 256;
/// Longest prompt or message. A request is not longer anyway; this is the limit that messages name.
const TEXT_BYTES_MAX: usize = super::REQUEST_BYTES_MAX;

impl TextRequest {
    /// Decodes a request body. `url` is the endpoint that a batch line names, if any.
    pub(super) fn decode(body: Value, url: Option<&str>, limits: &JobLimits) -> Result<Self, Reject> {
        let mut fields = Fields::open("", body)?;
        let chat = match (fields.has("messages"), fields.has("prompt"), url) {
            (true, true, _) => {
                return Err(Reject::Unsupported { field: "prompt".into(), reason: "messages is there too" });
            }
            (true, false, None | Some(CHAT_COMPLETIONS)) => true,
            (false, true, None | Some(COMPLETIONS)) => false,
            (_, _, Some(CHAT_COMPLETIONS)) => {
                return Err(Reject::Missing { field: "messages".into(), expected: "an array of messages" });
            }
            (_, _, Some(_)) => {
                let expected = "a string, or an array of strings or token ids";
                return Err(Reject::Missing { field: "prompt".into(), expected });
            }
            (false, false, None) => {
                let expected = "an array of messages, or send a prompt";
                return Err(Reject::Missing { field: "messages".into(), expected });
            }
        };
        let params = params::read(&mut fields, chat, limits)?;
        let input = if chat { read_chat(&mut fields)? } else { read_prompts(&mut fields, limits)? };
        fields.done()?;
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

fn read_chat(fields: &mut Fields) -> Result<Input, Reject> {
    let values = fields.list("messages", "messages", MESSAGES_MAX)?.unwrap_or_default();
    if values.is_empty() {
        return Err(Reject::Missing { field: "messages".into(), expected: "an array of at least 1 message" });
    }
    let messages = values
        .into_iter()
        .enumerate()
        .map(|(i, value)| read_message(&format!("messages[{i}]"), value))
        .collect::<Result<Vec<_>, _>>()?;
    let continue_final_message = fields.boolean("continue_final_message")?.unwrap_or(false);
    let add_generation_prompt = fields.boolean("add_generation_prompt")?;
    if continue_final_message && add_generation_prompt == Some(true) {
        return Err(Reject::Value {
            field: "add_generation_prompt".into(),
            value: "true".into(),
            expected: "allowed with continue_final_message: true".into(),
        });
    }
    let variables = match fields.take("chat_template_kwargs") {
        None => serde_json::Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(refuse("chat_template_kwargs".into(), &other, "an object")),
    };
    check_variables(&variables)?;
    Ok(Input::Chat(Chat {
        messages,
        add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
        continue_final_message,
        variables,
    }))
}

/// Only plain values: a template's author reckons with flags and names, not with structures of callers.
fn check_variables(variables: &serde_json::Map<String, Value>) -> Result<(), Reject> {
    let field = "chat_template_kwargs";
    if variables.len() > VARIABLES_MAX {
        return Err(Reject::TooMany { field: field.into(), what: "variables", limit: VARIABLES_MAX });
    }
    for (name, value) in variables {
        let reserved = ["messages", "add_generation_prompt", "bos_token", "eos_token"];
        if reserved.contains(&name.as_str()) {
            let reason = "the variable is set by the request itself";
            return Err(Reject::Unsupported { field: format!("{field}.{name}"), reason });
        }
        if value.is_array() || value.is_object() {
            let expected = "a string, number, true, false or null";
            return Err(refuse(field.into(), value, expected));
        }
    }
    Ok(())
}

fn read_message(path: &str, value: Value) -> Result<Message, Reject> {
    let mut fields = Fields::open(path, value)?;
    for name in ["tool_calls", "tool_call_id", "function_call", "audio", "refusal"] {
        if fields.has(name) {
            let reason = "only text messages are";
            return Err(Reject::Unsupported { field: fields.path_of(name), reason });
        }
        fields.ignore(&[name]);
    }
    let role = fields.one_of("role", &["system", "developer", "user", "assistant"])?;
    let role = role.ok_or_else(|| Reject::Missing {
        field: fields.path_of("role"),
        expected: "\"system\", \"user\" or \"assistant\"",
    })?;
    let content = fields.take("content").ok_or_else(|| Reject::Missing {
        field: fields.path_of("content"),
        expected: "a string or an array of text parts",
    })?;
    let content = read_content(&fields.path_of("content"), content)?;
    let name = fields.text("name", 1..=NAME_BYTES_MAX)?;
    let reasoning_content = fields.text("reasoning_content", 0..=TEXT_BYTES_MAX)?;
    fields.done()?;
    // OpenAI renamed the role; templates know the older name.
    let role = if role == "developer" { "system" } else { role };
    Ok(Message { role: role.to_owned(), content, name, reasoning_content })
}

fn read_content(path: &str, value: Value) -> Result<String, Reject> {
    let parts = match value {
        Value::Array(parts) => parts,
        value @ Value::String(_) => return text(path, value, 0..=TEXT_BYTES_MAX),
        other => return Err(refuse_kind(path.to_owned(), &other, "a string or an array of text parts")),
    };
    if parts.len() > PARTS_MAX {
        return Err(Reject::TooMany { field: path.to_owned(), what: "parts", limit: PARTS_MAX });
    }
    let mut content = String::new();
    for (i, part) in parts.into_iter().enumerate() {
        let mut fields = Fields::open(&format!("{path}[{i}]"), part)?;
        fields.one_of("type", &["text"])?;
        let text = fields
            .text("text", 0..=TEXT_BYTES_MAX)?
            .ok_or_else(|| Reject::Missing { field: fields.path_of("text"), expected: "a string" })?;
        fields.done()?;
        content.push_str(&text);
    }
    Ok(content)
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
    if fields.boolean("echo")?.unwrap_or(false) {
        let reason = "the caller has the prompt already";
        return Err(Reject::Unsupported { field: "echo".into(), reason });
    }
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
