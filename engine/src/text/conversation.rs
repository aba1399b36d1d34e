//! A request's conversation in the form that templates know.
//!
//! It follows transformers 5.24: what is `null` is not there, the assistant's reasoning goes by each of its names. And
//! it follows vLLM where transformers leaves it to the caller: arguments of tool calls come as text and are read,
//! texts of one message that the template cannot take in parts are joined with line feeds.

use crate::text::jinja::json;
use crate::text::jinja::value::{Dict, PyValue};
use crate::text::job::{Chat, Json, Reject, part_text};

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

fn read(json: &Json) -> Result<PyValue, Reject> {
    json::parse(&json.0).map_err(refuse)
}

/// A list of values.
pub fn list(values: Vec<PyValue>) -> Result<PyValue, Reject> {
    PyValue::list(values).map_err(|_| refuse("the messages nest too deep".into()))
}

fn dict(dict: Dict) -> Result<PyValue, Reject> {
    PyValue::dict(dict).map_err(|_| refuse("the messages nest too deep".into()))
}

/// The variables that the request gives.
pub fn variables(chat: &Chat) -> Result<Vec<(String, PyValue)>, Reject> {
    let mut found = Vec::new();
    for (name, json) in [("tools", &chat.tools), ("documents", &chat.documents)] {
        if let Some(json) = json {
            found.push((name.to_owned(), read(json)?));
        }
    }
    if let Some(json) = &chat.variables
        && let PyValue::Dict(dict) = read(json)?
    {
        found.extend(dict.entries().iter().map(|(name, value)| (name.to_text(), value.clone())));
    }
    Ok(found)
}

/// The messages.
pub fn messages(chat: &Chat, abilities: Abilities) -> Result<Vec<PyValue>, Reject> {
    chat.messages.iter().map(|json| message(json, abilities)).collect()
}

fn message(json: &Json, abilities: Abilities) -> Result<PyValue, Reject> {
    let PyValue::Dict(given) = read(json)? else { return Err(refuse("a message is no object".into())) };
    let reasoning = REASONING.iter().find_map(|name| given.get_text(name).filter(|value| says(value)));
    let mut made = Dict::default();
    if let Some(reasoning) = reasoning {
        made.insert(PyValue::text("thinking"), reasoning.clone());
    }
    for (name, value) in given.entries() {
        let text = name.to_text();
        let value = match (text.as_str(), value) {
            (_, PyValue::None) => continue,
            ("tool_calls", PyValue::List(calls)) if calls.items.is_empty() => continue,
            ("tool_calls", PyValue::List(calls)) => {
                list(calls.items.iter().map(tool_call).collect::<Result<_, _>>()?)?
            }
            ("content", PyValue::List(parts)) if !abilities.parts || parts.items.is_empty() => {
                PyValue::text(joined(&parts.items))
            }
            ("content", PyValue::List(parts)) => {
                list(parts.items.iter().map(text_part).collect::<Result<_, _>>()?)?
            }
            ("role", PyValue::Text(role)) if &**role == "developer" && !abilities.developer => {
                PyValue::text("system")
            }
            (name, _) if BOOKKEEPING.contains(&name) => continue,
            _ => value.clone(),
        };
        made.insert(name.clone(), value);
    }
    if let Some(reasoning) = reasoning {
        made.insert(PyValue::text("reasoning_content"), reasoning.clone());
    }
    let is_assistant = made.get_text("role").is_some_and(|role| role.equals(&PyValue::text("assistant")));
    if is_assistant && made.get_text("content").is_none() && made.get_text("tool_calls").is_none() {
        made.insert(PyValue::text("content"), PyValue::text(""));
    }
    dict(made)
}

/// Whether a value is more than nothing.
fn says(value: &PyValue) -> bool {
    !matches!(value, PyValue::None)
}

/// The texts of a message's parts.
fn joined(parts: &[PyValue]) -> String {
    parts.iter().map(text_of).collect::<Vec<_>>().join("\n")
}

/// The text of a part, which may be a text alone.
fn text_of(part: &PyValue) -> String {
    match part {
        PyValue::Dict(dict) => {
            let kind = dict.get_text("type").map(PyValue::to_text).unwrap_or_default();
            dict.get_text(part_text(&kind)).map(PyValue::to_text).unwrap_or_default()
        }
        text => text.to_text(),
    }
}

/// A part as templates know it.
fn text_part(part: &PyValue) -> Result<PyValue, Reject> {
    if let PyValue::Dict(given) = part
        && given.get_text("type").is_none_or(|kind| kind.equals(&PyValue::text("text")))
    {
        return Ok(part.clone());
    }
    let mut made = Dict::default();
    made.insert(PyValue::text("type"), PyValue::text("text"));
    made.insert(PyValue::text("text"), PyValue::text(text_of(part)));
    dict(made)
}

/// A tool call with its arguments as values. Callers send them as JSON text, as they came out of a model.
fn tool_call(call: &PyValue) -> Result<PyValue, Reject> {
    let PyValue::Dict(given) = call else { return Ok(call.clone()) };
    let mut made = Dict::default();
    for (name, value) in given.entries() {
        let value = match (name.to_text().as_str(), value) {
            (_, PyValue::None) => continue,
            ("function", PyValue::Dict(function)) => {
                let mut inner = Dict::default();
                for (name, value) in function.entries() {
                    let value = match (name.to_text().as_str(), value) {
                        ("arguments", PyValue::Text(text)) if text.trim().is_empty() => {
                            PyValue::dict(Dict::default()).ok()
                        }
                        ("arguments", PyValue::Text(text)) => Some(json::parse(text).map_err(refuse)?),
                        _ => Some(value.clone()),
                    };
                    inner.insert(name.clone(), value.unwrap_or(PyValue::None));
                }
                dict(inner)?
            }
            _ => value.clone(),
        };
        made.insert(name.clone(), value);
    }
    dict(made)
}

/// The text of the last message, where the answer has its role, as vLLM's `echo` of a chat has it; else nothing.
pub fn continued(chat: &Chat) -> String {
    let last = chat.messages.last().and_then(|json| read(json).ok());
    let Some(PyValue::Dict(last)) = last else { return String::new() };
    let is_answer = last.get_text("role").is_some_and(|role| role.equals(&PyValue::text("assistant")));
    if !is_answer && chat.add_generation_prompt {
        return String::new();
    }
    match last.get_text("content") {
        Some(PyValue::Text(text)) => text.to_string(),
        Some(PyValue::List(parts)) => joined(&parts.items),
        _ => String::new(),
    }
}

/// Puts a tag behind the text of the last message; gives the text.
pub fn mark_end(messages: &mut [PyValue], tag: &str) -> Result<String, Reject> {
    let nothing = || refuse("the final message, which is to be continued, has no text".into());
    let last = messages.last_mut().ok_or_else(nothing)?;
    let PyValue::Dict(given) = &*last else { return Err(nothing()) };
    let mut made = Dict::default();
    let mut found = None;
    for (name, value) in given.entries() {
        let value = match (name.to_text().as_str(), value) {
            ("content", PyValue::Text(text)) => {
                found = Some(text.to_string());
                PyValue::text(format!("{text}{tag}"))
            }
            ("content", PyValue::List(parts)) => {
                let mut parts = parts.items.clone();
                if let Some(PyValue::Dict(part)) = parts.last().cloned()
                    && let Some(text) = part.get_text("text").map(PyValue::to_text)
                {
                    let mut tagged = Dict::default();
                    part.entries()
                        .iter()
                        .for_each(|(name, value)| tagged.insert(name.clone(), value.clone()));
                    tagged.insert(PyValue::text("text"), PyValue::text(format!("{text}{tag}")));
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
