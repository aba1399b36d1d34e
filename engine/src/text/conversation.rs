//! A request's conversation in the form that templates know.
//!
//! It follows transformers 5.24: what is `null` is not there, the assistant's reasoning goes by each of its names. And
//! it follows vLLM where transformers leaves it to the caller: arguments of tool calls come as text and are read,
//! texts of one message that the template cannot take in parts are joined with line feeds.

use crate::text::jinja::json;
use crate::text::jinja::value::{Dict, Value};
use crate::text::job::{Chat, Json, Reject};

/// What a template can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// The role `developer`; else it becomes `system`, its older name.
    pub developer: bool,
    /// A message's text.
    pub content: bool,
    /// Messages in parts.
    pub parts: bool,
}

/// Names of the assistant's reasoning, the one that templates read first.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];
/// Fields of answers that come back in conversations and say nothing to a template.
pub const BOOKKEEPING: [&str; 4] = ["refusal", "annotations", "audio", "function_call"];

fn refuse(error: String) -> Reject {
    Reject::Template(error)
}

fn read(json: &Json) -> Result<Value, Reject> {
    json::parse(&json.0).map_err(refuse)
}

/// A list of values.
pub fn list(values: Vec<Value>) -> Result<Value, Reject> {
    Value::list(values).map_err(|_| refuse("the messages nest too deep".into()))
}

fn dict(dict: Dict) -> Result<Value, Reject> {
    Value::dict(dict).map_err(|_| refuse("the messages nest too deep".into()))
}

/// The variables that the request gives.
pub fn variables(chat: &Chat) -> Result<Vec<(String, Value)>, Reject> {
    let mut found = Vec::new();
    for (name, json) in [("tools", &chat.tools), ("documents", &chat.documents)] {
        if let Some(json) = json {
            found.push((name.to_owned(), read(json)?));
        }
    }
    if let Some(json) = &chat.variables
        && let Value::Dict(dict) = read(json)?
    {
        found.extend(dict.entries().iter().map(|(name, value)| (name.to_text(), value.clone())));
    }
    Ok(found)
}

/// The messages.
pub fn messages(chat: &Chat, abilities: Abilities) -> Result<Vec<Value>, Reject> {
    chat.messages.iter().map(|json| message(json, abilities)).collect()
}

fn message(json: &Json, abilities: Abilities) -> Result<Value, Reject> {
    let Value::Dict(given) = read(json)? else { return Err(refuse("a message is no object".into())) };
    let reasoning = REASONING.iter().find_map(|name| given.get_text(name).filter(|value| says(value)));
    let mut made = Dict::default();
    if let Some(reasoning) = reasoning {
        made.insert(Value::text("thinking"), reasoning.clone());
    }
    for (name, value) in given.entries() {
        let text = name.to_text();
        let value = match (text.as_str(), value) {
            (_, Value::None) => continue,
            ("tool_calls", Value::List(calls)) if calls.items.is_empty() => continue,
            ("tool_calls", Value::List(calls)) => {
                list(calls.items.iter().map(tool_call).collect::<Result<_, _>>()?)?
            }
            ("content", Value::List(parts)) if !abilities.parts || parts.items.is_empty() => {
                Value::text(joined(&parts.items))
            }
            ("role", Value::Text(role)) if &**role == "developer" && !abilities.developer => {
                Value::text("system")
            }
            (name, _) if BOOKKEEPING.contains(&name) => continue,
            _ => value.clone(),
        };
        made.insert(name.clone(), value);
    }
    if let Some(reasoning) = reasoning {
        made.insert(Value::text("reasoning_content"), reasoning.clone());
    }
    let is_assistant = made.get_text("role").is_some_and(|role| role.equals(&Value::text("assistant")));
    if is_assistant && made.get_text("content").is_none() && made.get_text("tool_calls").is_none() {
        made.insert(Value::text("content"), Value::text(""));
    }
    dict(made)
}

/// Whether a value is more than nothing.
fn says(value: &Value) -> bool {
    !matches!(value, Value::None)
}

/// The texts of a message's parts.
fn joined(parts: &[Value]) -> String {
    let text = |part: &Value| match part {
        Value::Dict(part) => part.get_text("text").map(Value::to_text).unwrap_or_default(),
        _ => String::new(),
    };
    parts.iter().map(text).collect::<Vec<_>>().join("\n")
}

/// A tool call with its arguments as values. Callers send them as JSON text, as they came out of a model.
fn tool_call(call: &Value) -> Result<Value, Reject> {
    let Value::Dict(given) = call else { return Ok(call.clone()) };
    let mut made = Dict::default();
    for (name, value) in given.entries() {
        let value = match (name.to_text().as_str(), value) {
            (_, Value::None) => continue,
            ("function", Value::Dict(function)) => {
                let mut inner = Dict::default();
                for (name, value) in function.entries() {
                    let value = match (name.to_text().as_str(), value) {
                        ("arguments", Value::Text(text)) if text.trim().is_empty() => {
                            Value::dict(Dict::default()).ok()
                        }
                        ("arguments", Value::Text(text)) => Some(json::parse(text).map_err(refuse)?),
                        _ => Some(value.clone()),
                    };
                    inner.insert(name.clone(), value.unwrap_or(Value::None));
                }
                dict(inner)?
            }
            _ => value.clone(),
        };
        made.insert(name.clone(), value);
    }
    dict(made)
}

/// Puts a tag behind the text of the last message; gives the text.
pub fn mark_end(messages: &mut [Value], tag: &str) -> Result<String, Reject> {
    let nothing = || refuse("the final message, which is to be continued, has no text".into());
    let last = messages.last_mut().ok_or_else(nothing)?;
    let Value::Dict(given) = &*last else { return Err(nothing()) };
    let mut made = Dict::default();
    let mut found = None;
    for (name, value) in given.entries() {
        let value = match (name.to_text().as_str(), value) {
            ("content", Value::Text(text)) => {
                found = Some(text.to_string());
                Value::text(format!("{text}{tag}"))
            }
            ("content", Value::List(parts)) => {
                let mut parts = parts.items.clone();
                if let Some(Value::Dict(part)) = parts.last().cloned()
                    && let Some(text) = part.get_text("text").map(Value::to_text)
                {
                    let mut tagged = Dict::default();
                    part.entries()
                        .iter()
                        .for_each(|(name, value)| tagged.insert(name.clone(), value.clone()));
                    tagged.insert(Value::text("text"), Value::text(format!("{text}{tag}")));
                    parts.pop();
                    parts.push(dict(tagged)?);
                    found = Some(text);
                }
                list(parts)?
            }
            _ => value.clone(),
        };
        made.insert(name.clone(), value);
    }
    *last = dict(made)?;
    found.ok_or_else(nothing)
}
