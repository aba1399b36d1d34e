//! Chat templates: a conversation to the text that a model was trained on.
//!
//! Templates are programs of a model's author. They run in minijinja with the settings and functions of
//! Hugging Face's `apply_chat_template`, without a loader, under limits of source, fuel (instructions),
//! recursion and output. A template sees no clock: `strftime_now` gives the time at which the job was
//! published, in UTC, so that every attempt renders the same text.

use std::fmt::Write as _;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, escape_formatter};
use time::OffsetDateTime;

use crate::text::job::{Chat, Reject};

/// Longest source; the longest in use (with tools and documents) have about 30 KiB.
pub const SOURCE_BYTES_MAX: usize = 256 << 10;
/// Instructions per rendering: some hundred for each of the most messages that a job may have.
const FUEL: u64 = 4_000_000;
/// Depth of macro calls and blocks.
const RECURSION_MAX: usize = 100;
/// Longest rendered text: the largest request, and as much again for what the template adds.
const OUTPUT_BYTES_MAX: usize = 2 * crate::text::job::REQUEST_BYTES_MAX;
/// Characters of a template's error that go into a message.
const ERROR_CHARS_MAX: usize = 300;
/// The only template of the environment.
const NAME: &str = "chat";
/// The variable that carries the job's time to `strftime_now`. A template could read it; it may.
const CREATED: &str = "__created";

/// A compiled chat template.
#[derive(Debug, Clone)]
pub struct Template {
    environment: Environment<'static>,
    /// `bos_token` and the like, as variables.
    special_tokens: Vec<(String, String)>,
}

/// Why a template was refused at the start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// Its source is too long.
    #[error("the chat template has {bytes} bytes; the limit is {limit}")]
    TooLong {
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// It does not compile.
    #[error("the chat template does not compile: {0}")]
    Syntax(String),
}

impl Template {
    /// Compiles a template. `special_tokens` are variables such as `bos_token`.
    ///
    /// # Errors
    /// When the source is too long or does not compile.
    pub fn new(source: &str, special_tokens: Vec<(String, String)>) -> Result<Self, TemplateError> {
        if source.len() > SOURCE_BYTES_MAX {
            return Err(TemplateError::TooLong { bytes: source.len(), limit: SOURCE_BYTES_MAX });
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| TemplateError::Syntax(describe(&error)))?);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION_MAX);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(format_as_python);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |state: &mut minijinja::State, format: String| {
            let created = state.lookup(CREATED).and_then(|value| i64::try_from(value).ok()).unwrap_or(0);
            strftime(created, &format)
        });
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| TemplateError::Syntax(describe(&error)))?;
        Ok(Self { environment, special_tokens })
    }

    /// Renders a conversation of a job that was published at `created` (Unix seconds).
    ///
    /// # Errors
    /// When the template refuses the conversation or breaks a limit.
    pub fn render(&self, chat: &Chat, created: i64) -> Result<String, Reject> {
        let text = |value: &str| Value::from(value.to_owned());
        let mut variables: Vec<(String, Value)> =
            self.special_tokens.iter().map(|(name, token)| (name.clone(), text(token))).collect();
        variables
            .extend(chat.variables.iter().map(|(name, value)| (name.clone(), Value::from(Serde(value)))));
        variables.push((CREATED.into(), Value::from(created)));
        variables.push(("messages".into(), Value::from(Serde(&chat.messages))));
        variables.push(("add_generation_prompt".into(), Value::from(chat.add_generation_prompt)));
        variables.push(("tools".into(), Value::from(())));
        variables.push(("documents".into(), Value::from(())));
        let template = self.environment.get_template(NAME).map_err(|error| refuse(&error))?;
        let mut output = Bounded { bytes: Vec::new() };
        let context = Value::from_pairs(variables);
        template.render_captured_to(context, &mut output).map_err(|error| refuse(&error))?;
        let mut rendered =
            String::from_utf8(output.bytes).map_err(|error| Reject::Template(error.to_string()))?;
        if chat.continue_final_message {
            cut_after_final_message(&mut rendered, chat)?;
        }
        Ok(rendered)
    }
}

/// Cuts what the template put behind the last message, so that the model continues it.
fn cut_after_final_message(rendered: &mut String, chat: &Chat) -> Result<(), Reject> {
    let last = chat.messages.last().map(|message| message.content.trim_end()).unwrap_or_default();
    // Templates may trim a message; what is left of it must be found to be continued.
    match rendered.rfind(last.trim_start()) {
        Some(at) if !last.trim_start().is_empty() => {
            rendered.truncate(at + last.trim_start().len());
            Ok(())
        }
        _ => Err(Reject::Template("it does not show the final message, which is to be continued".into())),
    }
}

fn refuse(error: &Error) -> Reject {
    Reject::Template(describe(error))
}

/// The message of the template's author or of minijinja, with the line.
fn describe(error: &Error) -> String {
    let detail = match error.kind() {
        ErrorKind::OutOfFuel => format!("more than {FUEL} instructions"),
        ErrorKind::WriteFailure => format!("more than {OUTPUT_BYTES_MAX} bytes of output"),
        kind => error.detail().map_or_else(|| kind.to_string(), str::to_owned),
    };
    let detail: String = detail.chars().take(ERROR_CHARS_MAX).collect();
    match error.line() {
        Some(line) => format!("{detail} (line {line} of the template)"),
        None => detail,
    }
}

/// Takes output up to the limit.
struct Bounded {
    bytes: Vec<u8>,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > OUTPUT_BYTES_MAX {
            return Err(io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `True`, `False` and `None` are written as Python writes them.
fn format_as_python(
    out: &mut minijinja::Output,
    state: &mut minijinja::State,
    value: &Value,
) -> Result<(), Error> {
    let text = match value.kind() {
        ValueKind::Bool if value.is_true() => "True",
        ValueKind::Bool => "False",
        ValueKind::None => "None",
        _ => return escape_formatter(out, state, value),
    };
    out.write_str(text).map_err(Error::from)
}

/// Hugging Face's `{% generation %}` marks what the assistant wrote, for training; its content is rendered.
/// The tags become `{% if true %}` and `{% endif %}`, which keeps their whitespace control.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag.find("%}") else { break };
        let (tag, after) = tag.split_at(end);
        match tag.trim_start_matches(['{', '%', '-', '+']).trim_end_matches(['-', '+']).trim() {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// `json.dumps(value, ensure_ascii=False, indent=...)` of Python, which is what Hugging Face's filter is:
/// no HTML escapes, `", "` and `": "` between parts.
fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    if indent.is_some_and(|indent| indent > INDENT_MAX) {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("indent is above {INDENT_MAX}")));
    }
    let json = serde_json::to_value(value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    let mut out = String::new();
    write_json(&json, indent, 0, &mut out);
    Ok(Value::from_safe_string(out))
}

/// Widest indentation of `tojson`.
const INDENT_MAX: usize = 16;

/// Nesting is bounded: values come from JSON of at most 128 levels, or from a template's own literals.
fn write_json(value: &serde_json::Value, indent: Option<usize>, depth: usize, out: &mut String) {
    let line = |out: &mut String, depth: usize| {
        if let Some(width) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', width * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value {
        serde_json::Value::Array(values) if !values.is_empty() => {
            out.push('[');
            for (i, value) in values.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { comma });
                line(out, depth + 1);
                write_json(value, indent, depth + 1, out);
            }
            line(out, depth);
            out.push(']');
        }
        serde_json::Value::Object(map) if !map.is_empty() => {
            out.push('{');
            for (i, (name, value)) in map.iter().enumerate() {
                out.push_str(if i == 0 { "" } else { comma });
                line(out, depth + 1);
                let _ = write!(out, "{}: ", serde_json::Value::from(name.as_str()));
                write_json(value, indent, depth + 1, out);
            }
            line(out, depth);
            out.push('}');
        }
        plain => {
            let _ = write!(out, "{plain}");
        }
    }
}

/// The part of C's `strftime` that templates use, in the C locale and UTC.
fn strftime(created: i64, format: &str) -> Result<String, Error> {
    let refuse = |what: String| Error::new(ErrorKind::InvalidOperation, what);
    let at = OffsetDateTime::from_unix_timestamp(created).map_err(|error| refuse(error.to_string()))?;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = chars.next().unwrap_or('%');
        let padded = code != '-';
        if !padded {
            code = chars.next().unwrap_or('%');
        }
        let (month, weekday) = (at.month().to_string(), at.weekday().to_string());
        let mut number = |value: u32, width: usize| {
            let width = if padded { width } else { 0 };
            let _ = write!(out, "{value:0width$}");
        };
        match code {
            'd' => number(at.day().into(), 2),
            'm' => number(u8::from(at.month()).into(), 2),
            'Y' => number(at.year().unsigned_abs(), 4),
            'y' => number(at.year().unsigned_abs() % 100, 2),
            'H' => number(at.hour().into(), 2),
            'I' => number(u32::from((at.hour() + 11) % 12) + 1, 2),
            'M' => number(at.minute().into(), 2),
            'S' => number(at.second().into(), 2),
            'j' => number(at.ordinal().into(), 3),
            'B' => out.push_str(&month),
            'b' => out.push_str(&month[..3]),
            'A' => out.push_str(&weekday),
            'a' => out.push_str(&weekday[..3]),
            'p' => out.push_str(if at.hour() < 12 { "AM" } else { "PM" }),
            '%' => out.push('%'),
            other => return Err(refuse(format!("strftime_now: %{other} is not supported"))),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
