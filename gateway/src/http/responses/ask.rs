//! What a client asks of `/v1/responses`, and the chat that it becomes.
//!
//! The fields that chats do not have are read here; all others go to the worker as they came. What changes the answer
//! and is not done is refused by its name, never passed over.

use bytes::Bytes;
use serde_json::{Map, Value, json};

use crate::http::error::{ApiCode, ApiError};

/// Most pairs of `metadata`, and longest names and values in characters, as OpenAI has them.
const METADATA_MAX: (usize, usize, usize) = (16, 64, 512);
/// Fields that are refused unless they say nothing.
const UNSUPPORTED: [(&str, &str); 14] = [
    ("conversation", "give previous_response_id"),
    ("prompt", "give input"),
    ("messages", "give input"),
    ("n", "a response is one answer"),
    ("max_tokens", "give max_output_tokens"),
    ("max_completion_tokens", "give max_output_tokens"),
    ("response_format", "give text.format"),
    ("tools", "only text is answered"),
    ("max_tool_calls", "only text is answered"),
    ("reasoning", "leave it out"),
    ("context_management", "leave it out"),
    ("moderation", "leave it out"),
    ("logprobs", "give include: [\"message.output_text.logprobs\"]"),
    ("suffix", "leave it out"),
];
/// Fields that stand in the response as they came.
const ECHOED: [&str; 10] = [
    "instructions",
    "max_output_tokens",
    "metadata",
    "previous_response_id",
    "temperature",
    "top_logprobs",
    "top_p",
    "user",
    "safety_identifier",
    "prompt_cache_key",
];
/// The value of `include` that is known.
const LOGPROBS: &str = "message.output_text.logprobs";

/// A request, as far as the gateway reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct ResponseAsk {
    /// What it calls the model.
    pub model: String,
    /// Whether nobody waits for it.
    pub background: bool,
    /// Whether it shall be streamed.
    pub stream: bool,
    /// Whether it can be asked for later.
    pub store: bool,
    /// The response that it continues.
    pub previous: Option<String>,
    /// Its own messages, in the form of chats.
    pub messages: Vec<Value>,
    /// What the response says of the request.
    pub echo: Map<String, Value>,
    instructions: Option<String>,
    rest: Map<String, Value>,
}

fn wrong(field: &str, value: &Value, expected: &str) -> ApiError {
    let shown: String = value.to_string().chars().take(80).collect();
    ApiError::of(ApiCode::InvalidParameter, field, format_args!("{shown} is not {expected}"))
}

fn missing(field: &str) -> ApiError {
    ApiError::of(ApiCode::MissingParameter, field, "missing")
}

/// Whether a value says nothing.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(Value::is_null),
        _ => false,
    }
}

fn boolean(fields: &mut Map<String, Value>, name: &str, default: bool) -> Result<bool, ApiError> {
    match fields.shift_remove(name) {
        None => Ok(default),
        Some(Value::Bool(value)) => Ok(value),
        Some(other) => Err(wrong(name, &other, "true or false")),
    }
}

fn string(fields: &mut Map<String, Value>, name: &str) -> Result<Option<String>, ApiError> {
    match fields.shift_remove(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong(name, &other, "a string")),
    }
}

impl ResponseAsk {
    /// Reads a body.
    ///
    /// # Errors
    /// [`ApiCode::InvalidJson`], [`ApiCode::MissingParameter`], [`ApiCode::InvalidParameter`].
    pub fn read(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields: Map<String, Value> = serde_json::from_slice(body).map_err(|error| {
            ApiError::new(ApiCode::InvalidJson, format!("the body is not a JSON object: {error}"))
        })?;
        // What a client sends for None is absent.
        fields.retain(|_, value| !value.is_null());
        let given = ECHOED.iter().filter_map(|name| Some((name.to_string(), fields.get(*name)?.clone())));
        let echo = given.collect();
        for (name, instead) in UNSUPPORTED {
            if let Some(value) = fields.shift_remove(name).filter(|value| !is_empty(value)) {
                return Err(wrong(name, &value, &format!("supported: {instead}")));
            }
        }
        let model = string(&mut fields, "model")?.ok_or_else(|| missing("model"))?;
        let messages = messages(fields.shift_remove("input").ok_or_else(|| missing("input"))?)?;
        let background = boolean(&mut fields, "background", false)?;
        let store = boolean(&mut fields, "store", true)?;
        if background && !store {
            let message = "false with background: true: nobody could ask for the response";
            return Err(ApiError::of(ApiCode::InvalidParameter, "store", message));
        }
        let ask = Self {
            model,
            background,
            store,
            stream: boolean(&mut fields, "stream", false)?,
            previous: string(&mut fields, "previous_response_id")?,
            messages,
            echo,
            instructions: string(&mut fields, "instructions")?,
            rest: Map::new(),
        };
        metadata(fields.shift_remove("metadata"))?;
        neutral(&mut fields)?;
        renamed(&mut fields)?;
        Ok(Self { rest: fields, ..ask })
    }

    /// The body of the job: a chat that begins with these messages.
    pub fn chat(&self, before: &[Value]) -> Bytes {
        let instructions = self.instructions.iter().map(|text| json!({"role": "system", "content": text}));
        let messages: Vec<Value> =
            instructions.chain(before.iter().cloned()).chain(self.messages.iter().cloned()).collect();
        let mut body = self.rest.clone();
        body.insert("model".into(), self.model.clone().into());
        body.insert("messages".into(), messages.into());
        if self.stream {
            body.insert("stream".into(), true.into());
        }
        Value::Object(body).to_string().into()
    }
}

/// The messages of `input`.
fn messages(input: Value) -> Result<Vec<Value>, ApiError> {
    match input {
        Value::String(text) => Ok(vec![json!({"role": "user", "content": text})]),
        Value::Array(items) if !items.is_empty() => {
            items.iter().enumerate().map(|(at, item)| message(&format!("input[{at}]"), item)).collect()
        }
        other => Err(wrong("input", &other, "a string or a list of at least one item")),
    }
}

fn message(field: &str, item: &Value) -> Result<Value, ApiError> {
    let Value::Object(fields) = item else { return Err(wrong(field, item, "an item")) };
    if let Some(kind) = fields.get("type").filter(|kind| **kind != "message") {
        return Err(wrong(&format!("{field}.type"), kind, "supported: only \"message\" is"));
    }
    let role = fields.get("role").ok_or_else(|| missing(&format!("{field}.role")))?;
    if !["user", "assistant", "system", "developer"].iter().any(|known| role == known) {
        return Err(wrong(&format!("{field}.role"), role, "user, assistant, system or developer"));
    }
    let path = format!("{field}.content");
    let content = match fields.get("content").ok_or_else(|| missing(&path))? {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts = parts.iter().enumerate().map(|(at, part)| part_text(&format!("{path}[{at}]"), part));
            texts.collect::<Result<String, ApiError>>()?
        }
        other => return Err(wrong(&path, other, "a string or a list of parts")),
    };
    Ok(json!({"role": role, "content": content}))
}

fn part_text<'a>(field: &str, part: &'a Value) -> Result<&'a str, ApiError> {
    let name = match part["type"].as_str() {
        Some("input_text" | "output_text" | "text") => "text",
        Some("refusal") => "refusal",
        _ => {
            let expected = "supported: only \"input_text\", \"output_text\" and \"refusal\" are";
            return Err(wrong(&format!("{field}.type"), &part["type"], expected));
        }
    };
    part[name].as_str().ok_or_else(|| wrong(&format!("{field}.{name}"), &part[name], "a string"))
}

fn metadata(value: Option<Value>) -> Result<(), ApiError> {
    let (pairs_max, name_max, value_max) = METADATA_MAX;
    let fields = match &value {
        None => return Ok(()),
        Some(Value::Object(fields)) => fields,
        Some(other) => return Err(wrong("metadata", other, "an object")),
    };
    if fields.len() > pairs_max {
        let message = format!("{} pairs; {pairs_max} are allowed", fields.len());
        return Err(ApiError::of(ApiCode::InvalidParameter, "metadata", message));
    }
    for (name, value) in fields {
        let short = value.as_str().is_some_and(|text| text.chars().count() <= value_max);
        if !short || name.chars().count() > name_max {
            let shown: String = name.chars().take(name_max).collect();
            let expected =
                format!("a string of at most {value_max} characters under a name of at most {name_max}");
            return Err(wrong(&format!("metadata.{shown}"), value, &expected));
        }
    }
    Ok(())
}

/// Fields of which one value is known, the one that changes nothing.
fn neutral(fields: &mut Map<String, Value>) -> Result<(), ApiError> {
    let known: [(&str, &[&str]); 2] = [("truncation", &["disabled"]), ("tool_choice", &["auto", "none"])];
    for (name, values) in known {
        if let Some(value) = fields.shift_remove(name)
            && !values.iter().any(|known| value == *known)
        {
            return Err(wrong(name, &value, &format!("supported: only {:?} is", values[0])));
        }
    }
    let Some(text) = fields.shift_remove("text") else { return Ok(()) };
    let Value::Object(given) = &text else { return Err(wrong("text", &text, "an object")) };
    for (name, value) in given.iter().filter(|(_, value)| !value.is_null()) {
        let fine = match name.as_str() {
            "format" => value["type"] == "text",
            "verbosity" => value == "medium",
            _ => false,
        };
        if !fine {
            let expected = "supported: only format {\"type\": \"text\"} and verbosity \"medium\" are";
            return Err(wrong(&format!("text.{name}"), value, expected));
        }
    }
    Ok(())
}

/// Fields that chats call otherwise.
fn renamed(fields: &mut Map<String, Value>) -> Result<(), ApiError> {
    if let Some(limit) = fields.shift_remove("max_output_tokens") {
        if limit.as_u64().is_none_or(|limit| limit == 0) {
            return Err(wrong("max_output_tokens", &limit, "a whole number of at least 1"));
        }
        fields.insert("max_completion_tokens".into(), limit);
    }
    let mut logprobs = fields.get("top_logprobs").is_some_and(|top| top.as_u64() != Some(0));
    match fields.shift_remove("include") {
        None => {}
        Some(Value::Array(names)) => {
            if let Some(other) = names.iter().find(|name| *name != LOGPROBS) {
                return Err(wrong("include", other, &format!("supported: only {LOGPROBS:?} is")));
            }
            logprobs |= !names.is_empty();
        }
        Some(other) => return Err(wrong("include", &other, "a list")),
    }
    if logprobs {
        fields.insert("logprobs".into(), true.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<ResponseAsk, ApiError> {
        ResponseAsk::read(body.to_string().as_bytes())
    }

    fn chat(body: Value) -> Value {
        serde_json::from_slice(&read(body).unwrap().chat(&[])).unwrap()
    }

    #[test]
    fn a_text_is_a_chat_of_one_message() {
        let ask = read(json!({"model": "m", "input": "hello"})).unwrap();
        assert!(ask.store && !ask.background && !ask.stream);
        let expected = json!({"model": "m", "messages": [{"role": "user", "content": "hello"}]});
        assert_eq!(chat(json!({"model": "m", "input": "hello"})), expected);
    }

    #[test]
    fn items_instructions_and_options_become_those_of_a_chat() {
        let part = |kind: &str, text: &str| json!({"type": kind, "text": text, "annotations": []});
        let body = json!({
            "model": "m", "instructions": "be brief", "max_output_tokens": 7, "top_k": 3, "temperature": 0,
            "include": ["message.output_text.logprobs"], "metadata": {"a": "b"}, "tools": [], "text": {"format":
            {"type": "text"}}, "tool_choice": "auto", "truncation": "disabled", "reasoning": {"effort": null},
            "input": [
                {"role": "user", "content": [part("input_text", "a"), part("input_text", "b")]},
                {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                 "content": [part("output_text", "c")]},
                {"role": "user", "content": "d"}]});
        let said = |role: &str, content: &str| json!({"role": role, "content": content});
        let messages =
            [said("system", "be brief"), said("user", "ab"), said("assistant", "c"), said("user", "d")];
        let expected = json!({"top_k": 3, "temperature": 0, "max_completion_tokens": 7, "logprobs": true,
                              "model": "m", "messages": messages});
        assert_eq!(chat(body.clone()), expected);
        let echo = Value::Object(read(body).unwrap().echo);
        assert_eq!(echo["metadata"], json!({"a": "b"}));
        assert_eq!(echo["instructions"], "be brief");
    }

    #[test]
    fn what_is_not_done_is_refused_by_its_name() {
        let refused = |name: &str, value: Value| {
            let mut body = json!({"model": "m", "input": "x"});
            body[name] = value;
            let error = read(body).unwrap_err();
            (error.code, error.param.unwrap_or_default())
        };
        for (name, value, param) in [
            ("tools", json!([{"type": "web_search"}]), "tools"),
            ("conversation", json!("conv_1"), "conversation"),
            ("reasoning", json!({"effort": "high"}), "reasoning"),
            ("truncation", json!("auto"), "truncation"),
            ("text", json!({"format": {"type": "json_object"}}), "text.format"),
            ("include", json!(["file_search_call.results"]), "include"),
            ("n", json!(2), "n"),
            ("max_output_tokens", json!(0), "max_output_tokens"),
            ("input", json!([]), "input"),
            ("input", json!([{"role": "user"}]), "input[0].content"),
            ("input", json!([{"type": "function_call", "name": "f"}]), "input[0].type"),
            ("input", json!([{"role": "robot", "content": "x"}]), "input[0].role"),
            (
                "input",
                json!([{"role": "user", "content": [{"type": "input_image"}]}]),
                "input[0].content[0].type",
            ),
            ("background", json!("yes"), "background"),
            ("metadata", json!({"a": 1}), "metadata.a"),
        ] {
            let (code, named) = refused(name, value);
            assert_eq!(named, param);
            assert!(matches!(code, ApiCode::InvalidParameter | ApiCode::MissingParameter), "{name}");
        }
        let both = read(json!({"model": "m", "input": "x", "background": true, "store": false}));
        assert_eq!(both.unwrap_err().param.as_deref(), Some("store"));
        assert_eq!(read(json!({"model": "m"})).unwrap_err().param.as_deref(), Some("input"));
        assert_eq!(read(json!({"input": "x"})).unwrap_err().param.as_deref(), Some("model"));
        assert_eq!(ResponseAsk::read(b"[1]").unwrap_err().code, ApiCode::InvalidJson);
    }
}
