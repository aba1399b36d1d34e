//! The conversation of a request: checked here, and kept as its JSON has it.
//!
//! Emptiness says nothing: clients send back what servers answered, with fields that are `null` or empty.

use serde_json::Value;

use super::fields::{Fields, is_empty, refuse, refuse_kind, text};
use super::request::TEXT_BYTES_MAX;
use super::{Chat, Input, Json, Reading, Reject};
use crate::text::jinja::json;

/// Most messages of a conversation: no model's context holds as many turns.
pub const MESSAGES_MAX: usize = 4096;
/// Most parts of one message.
const PARTS_MAX: usize = 256;
/// Most tools, and calls of tools in one message.
const TOOLS_MAX: usize = 1024;
/// Most variables for the template.
const VARIABLES_MAX: usize = 32;
/// Longest name of a participant, a function or a call.
const NAME_BYTES_MAX: usize = 256;
/// Variables that the request sets by its own fields.
const RESERVED: [&str; 4] = ["messages", "add_generation_prompt", "tools", "documents"];

/// Kinds of parts of a message that are text: of chat completions, and of answers in OpenAI's other forms that come
/// back in conversations.
const PART_KINDS: [&str; 4] = ["text", "input_text", "output_text", "refusal"];

/// The field of a part of this kind that holds its text.
pub fn part_text(kind: &str) -> &'static str {
    if kind == "refusal" { "refusal" } else { "text" }
}

/// Reads the conversation's fields. `body` is the text of the whole request.
pub(super) fn read(fields: &mut Fields, body: &str, reading: &Reading<'_>) -> Result<Input, Reject> {
    let values = fields.list("messages", "messages", MESSAGES_MAX)?.unwrap_or_default();
    if values.is_empty() {
        return Err(Reject::Missing { field: "messages".into(), expected: "an array of at least 1 message" });
    }
    for (i, value) in values.into_iter().enumerate() {
        check_message(&format!("messages[{i}]"), value, reading)?;
    }
    let messages = json::elements(json::field(body, "messages").unwrap_or_default());
    let continue_final_message = fields.boolean("continue_final_message")?.unwrap_or(false);
    let add_generation_prompt = fields.boolean("add_generation_prompt")?;
    if fields.boolean("add_special_tokens")? == Some(true) {
        let reason = "the template writes them";
        return Err(Reject::Unsupported { field: fields.path_of("add_special_tokens"), reason });
    }
    if continue_final_message && add_generation_prompt == Some(true) {
        return Err(Reject::Value {
            field: "add_generation_prompt".into(),
            value: "true".into(),
            expected: "allowed with continue_final_message: true".into(),
        });
    }
    let has_tools = check_tools(fields)?;
    let has_documents = check_documents(fields)?;
    let has_variables = check_variables(fields)?;
    let kept = |is_there: bool, name: &str| {
        json::field(body, name).filter(|_| is_there).map(|text| Json(text.to_owned()))
    };
    let chat = Chat {
        messages: messages.into_iter().map(|text| Json(text.to_owned())).collect(),
        tools: kept(has_tools, "tools"),
        documents: kept(has_documents, "documents"),
        add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
        continue_final_message,
        variables: kept(has_variables, "chat_template_kwargs"),
    };
    check_integers(&chat)?;
    Ok(Input::Chat(chat))
}

/// Refuses integers that no value holds, before a template meets them.
fn check_integers(chat: &Chat) -> Result<(), Reject> {
    let fields =
        [("tools", &chat.tools), ("documents", &chat.documents), ("chat_template_kwargs", &chat.variables)];
    let numbered = chat.messages.iter().enumerate().map(|(i, message)| (format!("messages[{i}]"), message));
    let named = fields.into_iter().filter_map(|(name, json)| Some((name.to_owned(), json.as_ref()?)));
    for (field, json) in numbered.chain(named) {
        if let Err(error) = json::parse(&json.0) {
            return Err(Reject::Value {
                field,
                value: "a value".into(),
                expected: format!("possible: {error}"),
            });
        }
    }
    Ok(())
}

fn check_variables(fields: &mut Fields) -> Result<bool, Reject> {
    let field = "chat_template_kwargs";
    let variables = match fields.take(field) {
        None => return Ok(false),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(refuse(field.into(), &other, "an object")),
    };
    if variables.len() > VARIABLES_MAX {
        return Err(Reject::TooMany { field: field.into(), what: "variables", limit: VARIABLES_MAX });
    }
    match variables.keys().find(|name| RESERVED.contains(&name.as_str())) {
        Some(name) => Err(Reject::Unsupported {
            field: format!("{field}.{name}"),
            reason: "the variable is set by the request itself",
        }),
        None => Ok(true),
    }
}

/// Functions in OpenAI's form; the template writes them.
fn check_tools(fields: &mut Fields) -> Result<bool, Reject> {
    let tools = fields.list("tools", "tools", TOOLS_MAX)?.unwrap_or_default();
    for (i, tool) in tools.iter().enumerate() {
        let field = format!("tools[{i}]");
        let Value::Object(map) = tool else { return Err(refuse_kind(field, tool, "an object")) };
        if map.get("type").is_some_and(|kind| kind != "function") {
            return Err(refuse(format!("{field}.type"), &map["type"], "\"function\""));
        }
        let name = map.get("function").and_then(|function| function.get("name")).or_else(|| map.get("name"));
        if !name.is_some_and(Value::is_string) {
            return Err(Reject::Missing { field: format!("{field}.function.name"), expected: "a string" });
        }
    }
    let field = fields.path_of("tool_choice");
    match fields.take("tool_choice") {
        Some(choice) if !is_empty(&choice) && choice != "none" && choice != "auto" => {
            Err(Reject::Unsupported {
                field,
                reason: "output cannot be constrained; \"auto\" leaves the choice to the model",
            })
        }
        _ => Ok(!tools.is_empty()),
    }
}

fn check_documents(fields: &mut Fields) -> Result<bool, Reject> {
    let documents = fields.list("documents", "documents", TOOLS_MAX)?.unwrap_or_default();
    match documents.iter().position(|document| !document.is_object()) {
        Some(i) => Err(refuse_kind(format!("documents[{i}]"), &documents[i], "an object")),
        None => Ok(!documents.is_empty()),
    }
}

fn check_message(path: &str, value: Value, reading: &Reading<'_>) -> Result<(), Reject> {
    let mut fields = Fields::open(path, value)?;
    for name in ["function_call", "audio", "refusal"] {
        let field = fields.path_of(name);
        if fields.take(name).is_some_and(|value| !is_empty(&value)) {
            return Err(Reject::Unsupported { field, reason: "only text messages and tool_calls are" });
        }
    }
    fields.ignore(&["annotations"]);
    let role = fields.one_of("role", &["system", "developer", "user", "assistant", "tool"])?;
    let role = role.ok_or_else(|| Reject::Missing {
        field: fields.path_of("role"),
        expected: "\"system\", \"developer\", \"user\", \"assistant\" or \"tool\"",
    })?;
    check_tool_calls(&mut fields, role, reading)?;
    let field = fields.path_of("content");
    match fields.take("content") {
        Some(content) => check_content(&field, content, reading)?,
        None if role == "assistant" => {}
        None => {
            return Err(Reject::Missing { field, expected: "a string or an array of text parts" });
        }
    }
    fields.text("name", 0..=NAME_BYTES_MAX)?;
    fields.text("tool_call_id", 0..=NAME_BYTES_MAX)?;
    for name in ["reasoning_content", "reasoning", "thinking"] {
        fields.text(name, 0..=TEXT_BYTES_MAX)?;
    }
    fields.done(reading)
}

/// The calls that an assistant made. Their arguments are JSON text, as a model wrote them, or the object itself.
fn check_tool_calls(fields: &mut Fields, role: &str, reading: &Reading<'_>) -> Result<(), Reject> {
    let path = fields.path_of("tool_calls");
    let calls = fields.list("tool_calls", "calls", TOOLS_MAX)?.unwrap_or_default();
    if !calls.is_empty() && role != "assistant" {
        return Err(Reject::Unsupported { field: path, reason: "only an assistant calls tools" });
    }
    for (i, call) in calls.into_iter().enumerate() {
        let mut call = Fields::open(&format!("{path}[{i}]"), call)?;
        call.text("id", 0..=NAME_BYTES_MAX)?;
        call.one_of("type", &["function"])?;
        call.ignore(&["index"]);
        let field = call.path_of("function");
        let Some(function) = call.take("function") else {
            return Err(Reject::Missing { field, expected: "an object with name and arguments" });
        };
        let mut function = Fields::open(&field, function)?;
        if function.text("name", 1..=NAME_BYTES_MAX)?.is_none() {
            return Err(Reject::Missing { field: function.path_of("name"), expected: "a string" });
        }
        let field = function.path_of("arguments");
        match function.take("arguments") {
            Some(Value::String(text)) if !text.trim().is_empty() => {
                serde_json::from_str::<Value>(&text).map_err(|error| Reject::NotJson {
                    field: "tool_calls: arguments",
                    error: format!("{field}: {error}"),
                })?;
            }
            None | Some(Value::String(_) | Value::Object(_)) => {}
            Some(other) => return Err(refuse_kind(field, &other, "a string of JSON or an object")),
        }
        function.done(reading)?;
        call.done(reading)?;
    }
    Ok(())
}

fn check_content(path: &str, value: Value, reading: &Reading<'_>) -> Result<(), Reject> {
    let parts = match value {
        Value::Array(parts) => parts,
        value @ Value::String(_) => return text(path, value, 0..=TEXT_BYTES_MAX).map(|_| ()),
        other => return Err(refuse_kind(path.to_owned(), &other, "a string or an array of text parts")),
    };
    if parts.len() > PARTS_MAX {
        return Err(Reject::TooMany { field: path.to_owned(), what: "parts", limit: PARTS_MAX });
    }
    for (i, part) in parts.into_iter().enumerate() {
        if part.is_string() {
            continue;
        }
        let mut fields = Fields::open(&format!("{path}[{i}]"), part)?;
        let kind = fields.one_of("type", &PART_KINDS)?.unwrap_or("text");
        let name = part_text(kind);
        if fields.text(name, 0..=TEXT_BYTES_MAX)?.is_none() {
            return Err(Reject::Missing { field: fields.path_of(name), expected: "a string" });
        }
        fields.done(reading)?;
    }
    Ok(())
}
