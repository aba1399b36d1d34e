//! Reads the fields of one JSON object by name, each with its limits, and refuses what is left over.
//!
//! `null` counts as absent, as in OpenAI's API. Error messages quote numbers and short option texts, which
//! are needed to find the mistake, and never whole texts.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::Reading;
use super::reject::Reject;

/// Characters of a value that a message quotes.
const QUOTED_CHARS_MAX: usize = 60;

/// Below it, a float tells every whole number apart.
const WHOLE_MAX: f64 = 9_007_199_254_740_992.0;

/// The fields of an object that are not read yet.
pub(super) struct Fields {
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    /// `path` is put before the fields' names in messages; empty at the top.
    pub(super) fn open(path: &str, value: Value) -> Result<Self, Reject> {
        match value {
            Value::Object(map) => Ok(Self { path: path.to_owned(), map }),
            other => {
                let field = if path.is_empty() { "body" } else { path };
                Err(refuse_kind(field.to_owned(), &other, "an object"))
            }
        }
    }

    /// The full path of a field.
    pub(super) fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// Takes a field; `null` is absent.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// Whether a field is there and not `null`.
    pub(super) fn has(&self, name: &str) -> bool {
        self.map.get(name).is_some_and(|value| !value.is_null())
    }

    /// Takes a number within a range.
    pub(super) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, Reject> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64().filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number as f32)),
            None => {
                let expected = format!("a number from {} to {}", range.start(), range.end());
                Err(refuse(self.path_of(name), &value, &expected))
            }
        }
    }

    /// Takes a whole number within a range.
    pub(super) fn integer(&mut self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, Reject> {
        let Some(value) = self.take(name) else { return Ok(None) };
        // Some languages write every number with a point.
        let whole = value.as_f64().filter(|number| number.fract() == 0.0 && number.abs() < WHOLE_MAX);
        let number = value.as_i64().or(whole.map(|number| number as i64));
        match number.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => {
                let expected = format!("a whole number from {} to {}", range.start(), range.end());
                Err(refuse(self.path_of(name), &value, &expected))
            }
        }
    }

    /// Takes a whole number from `first` up to an unsigned limit.
    pub(super) fn count(&mut self, name: &str, first: u32, limit: u32) -> Result<Option<u32>, Reject> {
        let number = self.integer(name, i64::from(first)..=i64::from(limit))?;
        Ok(number.and_then(|number| u32::try_from(number).ok()))
    }

    /// Takes `true` or `false`.
    pub(super) fn boolean(&mut self, name: &str) -> Result<Option<bool>, Reject> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(refuse(self.path_of(name), &other, "true or false")),
        }
    }

    /// Takes a text of so many bytes.
    pub(super) fn text(
        &mut self,
        name: &str,
        bytes: RangeInclusive<usize>,
    ) -> Result<Option<String>, Reject> {
        let field = self.path_of(name);
        self.take(name).map(|value| text(&field, value, bytes)).transpose()
    }

    /// Takes a text that must be one of a few.
    pub(super) fn one_of(
        &mut self,
        name: &str,
        options: &[&'static str],
    ) -> Result<Option<&'static str>, Reject> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match options.iter().find(|&&option| value == option) {
            Some(&option) => Ok(Some(option)),
            None => Err(refuse(self.path_of(name), &value, &format!("\"{}\"", options.join("\" or \"")))),
        }
    }

    /// Takes a list of at most so many entries.
    pub(super) fn list(
        &mut self,
        name: &str,
        what: &'static str,
        limit: usize,
    ) -> Result<Option<Vec<Value>>, Reject> {
        let field = self.path_of(name);
        match self.take(name) {
            None => Ok(None),
            Some(Value::Array(values)) if values.len() > limit => Err(Reject::TooMany { field, what, limit }),
            Some(Value::Array(values)) => Ok(Some(values)),
            Some(other) => Err(refuse_kind(field, &other, &format!("an array of {what}"))),
        }
    }

    /// Takes fields that have no effect here.
    pub(super) fn ignore(&mut self, names: &[&str]) {
        for name in names {
            self.map.remove(*name);
        }
    }

    /// Refuses what was not read and says something, unless it may be ignored.
    pub(super) fn done(self, reading: &Reading<'_>) -> Result<(), Reject> {
        for (name, _) in self.map.iter().filter(|(_, value)| !is_empty(value)) {
            let field = self.path_of(&quote(name));
            if !reading.ignores(&field) {
                return Err(Reject::Unknown { field });
            }
        }
        Ok(())
    }
}

/// Whether a value says nothing: servers and clients fill fields that they do not use.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

/// A text of so many bytes. Its length is quoted when it is refused, not the text.
pub(super) fn text(field: &str, value: Value, bytes: RangeInclusive<usize>) -> Result<String, Reject> {
    match value {
        Value::String(text) if text.len() > *bytes.end() => {
            Err(Reject::TooLong { field: field.to_owned(), bytes: text.len(), limit: *bytes.end() })
        }
        Value::String(text) if text.len() < *bytes.start() => Err(Reject::Value {
            field: field.to_owned(),
            value: "\"\"".into(),
            expected: format!("a string of {} to {} bytes", bytes.start(), bytes.end()),
        }),
        Value::String(text) => Ok(text),
        other => Err(refuse_kind(field.to_owned(), &other, "a string")),
    }
}

/// A token id below the size of the vocabulary.
pub(super) fn token(field: &str, value: &Value, vocabulary: u32) -> Result<u32, Reject> {
    value
        .as_u64()
        .and_then(|id| u32::try_from(id).ok())
        .filter(|&id| id < vocabulary)
        .ok_or_else(|| refuse(field.to_owned(), value, &format!("a token id below {vocabulary}")))
}

/// The refusal of a value.
pub(super) fn refuse(field: String, value: &Value, expected: &str) -> Reject {
    Reject::Value { field, value: shown(value), expected: expected.to_owned() }
}

/// The refusal of a value that may hold a prompt: only its kind is told.
pub(super) fn refuse_kind(field: String, value: &Value, expected: &str) -> Reject {
    let value = match value {
        Value::String(_) => "a string".to_owned(),
        other => shown(other),
    };
    Reject::Value { field, value, expected: expected.to_owned() }
}

/// A value as messages may show it: numbers whole, texts cut short, the rest by kind.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => quote(&number.to_string()),
        Value::String(text) => format!("{:?}", quote(text)),
        Value::Array(values) => format!("an array of {}", values.len()),
        Value::Object(map) => format!("an object of {} fields", map.len()),
    }
}

fn quote(text: &str) -> String {
    match text.char_indices().nth(QUOTED_CHARS_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
