//! Marks around tokens that stand in a caller's text, so that they can be told from the template's own.
//!
//! The marks are two characters of private use, as in transformers' `sanitize_control_tokens`. A template may cut text
//! between them; a mark that stands alone is dropped.

use std::collections::{HashMap, HashSet};

use crate::text::jinja::value::{Dict, PyValue};

const BEGIN: char = '\u{F0000}';
const END: char = '\u{F0001}';

/// Finds tokens in callers' texts.
#[derive(Debug)]
pub struct Marker {
    tokens: HashSet<String>,
    /// By first character, the lengths in bytes of the tokens that begin with it, longest first.
    lengths: HashMap<char, Vec<usize>>,
}

impl Marker {
    /// For these tokens.
    pub fn new(tokens: impl IntoIterator<Item = String>) -> Self {
        let tokens: HashSet<String> = tokens.into_iter().collect();
        let mut lengths: HashMap<char, Vec<usize>> = HashMap::new();
        for token in &tokens {
            if let Some(first) = token.chars().next() {
                lengths.entry(first).or_default().push(token.len());
            }
        }
        for known in lengths.values_mut() {
            known.sort_unstable_by(|a, b| b.cmp(a));
            known.dedup();
        }
        Self { tokens, lengths }
    }

    /// A value whose texts have marks around the tokens. Names of fields stay as they are.
    pub fn marked(&self, value: &PyValue) -> PyValue {
        let kept = |made: Option<PyValue>| made.unwrap_or_else(|| value.clone());
        match value {
            PyValue::Text(text) => PyValue::text(self.marked_text(text)),
            PyValue::List(list) => {
                kept(PyValue::list(list.items.iter().map(|item| self.marked(item)).collect()).ok())
            }
            PyValue::Dict(dict) => {
                let mut made = Dict::default();
                dict.entries().iter().for_each(|(name, value)| made.insert(name.clone(), self.marked(value)));
                kept(PyValue::dict(made).ok())
            }
            other => other.clone(),
        }
    }

    fn marked_text(&self, text: &str) -> String {
        // A mark in the text itself could forge one.
        let text = text.replace([BEGIN, END], "");
        let mut out = String::with_capacity(text.len());
        let mut rest = text.as_str();
        while let Some(c) = rest.chars().next() {
            let lengths = self.lengths.get(&c).map(Vec::as_slice).unwrap_or_default();
            let is_token =
                |length: &&usize| rest.get(..**length).is_some_and(|part| self.tokens.contains(part));
            let longest = lengths.iter().find(is_token);
            let (piece, after) = rest.split_at(longest.copied().unwrap_or(c.len_utf8()));
            if longest.is_some() {
                out.push(BEGIN);
                out.push_str(piece);
                out.push(END);
            } else {
                out.push_str(piece);
            }
            rest = after;
        }
        out
    }
}

/// The pieces of a rendered text, and whether each is a token that the caller wrote.
pub fn parts(rendered: &str) -> Vec<(String, bool)> {
    let mut found: Vec<(String, bool)> = Vec::new();
    let mut rest = rendered;
    while let Some(at) = rest.find([BEGIN, END]) {
        let (before, after) = rest.split_at(at);
        found.push((before.to_owned(), false));
        let inner = &after[BEGIN.len_utf8()..];
        rest = inner;
        if after.starts_with(BEGIN)
            && let Some(end) = inner.find([BEGIN, END])
            && inner[end..].starts_with(END)
        {
            found.push((inner[..end].to_owned(), true));
            rest = &inner[end + END.len_utf8()..];
        }
    }
    found.push((rest.to_owned(), false));
    found.retain(|(text, _)| !text.is_empty());
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_marked_comes_apart_again() {
        let text = Marker::new(["<s>".to_owned(), "</s>".into()]).marked_text("a</s>\u{F0000}b<s></s>");
        let found = parts(&text);
        let seen: Vec<(&str, bool)> = found.iter().map(|(text, marked)| (text.as_str(), *marked)).collect();
        assert_eq!(seen, [("a", false), ("</s>", true), ("b", false), ("<s>", true), ("</s>", true)]);
    }

    #[test]
    fn a_mark_alone_is_dropped() {
        assert_eq!(parts("a\u{F0000}b"), [("a".to_owned(), false), ("b".to_owned(), false)]);
        assert_eq!(parts("\u{F0001}b"), [("b".to_owned(), false)]);
    }
}
