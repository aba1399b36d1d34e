//! Input files to requests: the pure first half of `submit`.
//!
//! Each request is checked as far as a caller can check it: it is JSON of the right form, its custom_id is
//! there and used once. Parameters are the worker's to judge. Nothing is dropped: each line is an entry
//! or a problem, and a problem names its file and line.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use millrace_crds::request::{BatchLine, CHAT_COMPLETIONS, COMPLETIONS};
use serde_json::{Map, Value, json};

use crate::args::{Format, PromptArgs};

/// Longest custom_id, in bytes.
pub const CUSTOM_ID_BYTES_MAX: usize = 512;

/// One input, read whole.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file's name, for messages.
    pub name: Arc<str>,
    /// What custom_ids of requests without one begin with.
    pub stem: String,
    /// What it holds.
    pub format: Format,
    /// The bytes.
    pub bytes: Bytes,
}

/// Where a request stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The file's name.
    pub file: Arc<str>,
    /// The line, from 1.
    pub line: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestEntry {
    /// Where it stands.
    pub origin: Origin,
    /// The caller's id.
    pub custom_id: String,
    /// The request body.
    pub body: Bytes,
    /// `/v1/chat/completions` or `/v1/completions`.
    pub url: &'static str,
}

/// What is wrong with an input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub origin: Origin,
    /// What: names field and value.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.message)
    }
}

/// Reads all sources into requests, in order, and lists what is wrong.
pub fn read(sources: &[Source], parameters: &PromptArgs) -> (Vec<RequestEntry>, Vec<Problem>) {
    let mut entries = Vec::new();
    let mut problems = Vec::new();
    for source in sources {
        for (origin, parsed) in source.requests(parameters) {
            match parsed {
                Ok((custom_id, body, url)) => entries.push(RequestEntry { origin, custom_id, body, url }),
                Err(message) => problems.push(Problem { origin, message }),
            }
        }
    }
    problems.extend(repeated(&entries));
    (entries, problems)
}

fn repeated(entries: &[RequestEntry]) -> Vec<Problem> {
    let mut first: HashMap<&str, &Origin> = HashMap::with_capacity(entries.len());
    let mut problems = Vec::new();
    for entry in entries {
        if let Some(earlier) = first.insert(&entry.custom_id, &entry.origin) {
            let message = format!(
                "custom_id {:?} stands at {earlier} already; results are matched by custom_id, so each is \
                 used once",
                cut(&entry.custom_id)
            );
            problems.push(Problem { origin: entry.origin.clone(), message });
            first.insert(&entry.custom_id, earlier);
        }
    }
    problems
}

type Parsed = Result<(String, Bytes, &'static str), String>;

impl Source {
    fn requests(&self, parameters: &PromptArgs) -> Vec<(Origin, Parsed)> {
        let at = |line| Origin { file: self.name.clone(), line };
        let text = match std::str::from_utf8(&self.bytes) {
            Ok(text) => text,
            Err(error) => {
                let line = 1 + self.bytes[..error.valid_up_to()].iter().filter(|&&b| b == b'\n').count();
                return vec![(at(line), Err(format!("byte {} is not UTF-8", error.valid_up_to())))];
            }
        };
        let lines = || text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let parsed: Vec<(Origin, Parsed)> = match self.sniffed(text) {
            Format::Jsonl | Format::Auto => lines()
                .map(|(index, line)| (at(index + 1), parse_line(line, &self.numbered(index))))
                .collect(),
            Format::Json => vec![(at(1), parse_body(text, &self.stem))],
            Format::Text => {
                vec![(at(1), prompt(text.trim_end_matches(['\n', '\r']), &self.stem, parameters))]
            }
            Format::Prompts => lines()
                .map(|(index, line)| (at(index + 1), prompt(line, &self.numbered(index), parameters)))
                .collect(),
        };
        if parsed.is_empty() {
            return vec![(at(1), Err("the input is empty; at least one request is needed".to_owned()))];
        }
        parsed
    }

    fn numbered(&self, index: usize) -> String {
        format!("{}-{}", self.stem, index + 1)
    }

    fn sniffed(&self, text: &str) -> Format {
        if self.format != Format::Auto {
            return self.format;
        }
        match self.name.rsplit_once('.').map(|(_, ending)| ending) {
            Some("jsonl" | "ndjson") => Format::Jsonl,
            Some("json") => Format::Json,
            Some("txt" | "md") => Format::Text,
            _ if !text.trim_start().starts_with('{') => Format::Text,
            _ if serde_json::from_str::<Map<String, Value>>(text).is_ok() => Format::Json,
            _ => Format::Jsonl,
        }
    }
}

fn parse_line(line: &str, custom_id: &str) -> Parsed {
    let fields: Map<String, Value> = serde_json::from_str(line).map_err(|e| not_json(&e))?;
    if !fields.contains_key("body") && !fields.contains_key("custom_id") {
        let url = url_of(&fields)?;
        return Ok((custom_id.to_owned(), Bytes::copy_from_slice(line.trim().as_bytes()), url));
    }
    // A line with one request needs no method or url; where they stand, they must be right.
    let mut fields = fields;
    fields.entry("method").or_insert_with(|| json!("POST"));
    fields.entry("url").or_insert(Value::Null);
    let stated_url = match fields.get_mut("url").map(Value::take) {
        Some(Value::Null) | None => None,
        Some(Value::String(url)) => Some(url),
        Some(other) => return Err(format!("url is {other}; it must be text")),
    };
    fields.insert("url".to_owned(), json!(stated_url.clone().unwrap_or_default()));
    let line: BatchLine = serde_json::from_value(Value::Object(fields)).map_err(|e| e.to_string())?;
    if line.method != "POST" {
        return Err(format!("method is {:?}; it must be \"POST\"", cut(&line.method)));
    }
    check_custom_id(&line.custom_id)?;
    let Value::Object(body) = &line.body else {
        return Err("body must be an object: an OpenAI request".to_owned());
    };
    let url = url_of(body).map_err(|error| format!("body: {error}"))?;
    if let Some(stated) = stated_url.filter(|stated| stated != url) {
        return Err(match stated.as_str() {
            CHAT_COMPLETIONS | COMPLETIONS => format!("url is {stated:?}, but the body is one of {url:?}"),
            _ => format!("url is {:?}; it must be {CHAT_COMPLETIONS:?} or {COMPLETIONS:?}", cut(&stated)),
        });
    }
    let body = serde_json::to_vec(&line.body).expect("a JSON value is JSON");
    Ok((line.custom_id, body.into(), url))
}

fn parse_body(text: &str, custom_id: &str) -> Parsed {
    let fields: Map<String, Value> = serde_json::from_str(text).map_err(|e| not_json(&e))?;
    let url = url_of(&fields)?;
    Ok((custom_id.to_owned(), Bytes::copy_from_slice(text.trim().as_bytes()), url))
}

fn not_json(error: &serde_json::Error) -> String {
    format!("not a JSON object: {error}")
}

fn url_of(body: &Map<String, Value>) -> Result<&'static str, String> {
    match (body.contains_key("messages"), body.contains_key("prompt")) {
        (true, false) => Ok(CHAT_COMPLETIONS),
        (false, true) => Ok(COMPLETIONS),
        (true, true) => Err("a request has \"messages\" or \"prompt\", not both".to_owned()),
        (false, false) => Err("a request has \"messages\" (chat) or \"prompt\"; neither is there".to_owned()),
    }
}

fn check_custom_id(custom_id: &str) -> Result<(), String> {
    if custom_id.is_empty() || custom_id.len() > CUSTOM_ID_BYTES_MAX {
        let length = custom_id.len();
        return Err(format!("custom_id has {length} bytes; 1 to {CUSTOM_ID_BYTES_MAX} are allowed"));
    }
    Ok(())
}

fn prompt(text: &str, custom_id: &str, parameters: &PromptArgs) -> Parsed {
    if text.trim().is_empty() {
        return Err("the prompt is empty".to_owned());
    }
    let (body, url) = prompt_body(text, parameters);
    let body = serde_json::to_vec(&body).expect("a JSON value is JSON");
    Ok((custom_id.to_owned(), body.into(), url))
}

fn prompt_body(text: &str, parameters: &PromptArgs) -> (Value, &'static str) {
    let mut body = Map::new();
    let chat = parameters.chat || parameters.system.is_some();
    if chat {
        let system = parameters.system.iter().map(|text| json!({"role": "system", "content": text}));
        let user = json!({"role": "user", "content": text});
        body.insert("messages".to_owned(), system.chain([user]).collect());
    } else {
        body.insert("prompt".to_owned(), json!(text));
    }
    let numbers = [
        ("max_tokens", parameters.max_tokens.map(|v| json!(v))),
        ("temperature", parameters.temperature.map(|v| json!(v))),
        ("top_p", parameters.top_p.map(|v| json!(v))),
        ("seed", parameters.seed.map(|v| json!(v))),
        ("stop", (!parameters.stop.is_empty()).then(|| json!(parameters.stop))),
    ];
    body.extend(numbers.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
    (Value::Object(body), if chat { CHAT_COMPLETIONS } else { COMPLETIONS })
}

fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests;
