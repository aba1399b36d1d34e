//! JSON as Python writes and reads it: a model folder's files come from there.
//!
//! Python's `json` writes `NaN`, `Infinity` and `-Infinity`, and reads numbers beyond a double as infinite. Such a
//! value becomes a string of that name: a field that nobody needs harms nobody, and one that has to be a number is
//! refused with its value.

use std::borrow::Cow;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::wrapping;

/// Reads a JSON file's bytes.
///
/// # Errors
/// When they are no JSON; the message is the rest of a sentence that begins with the file's name.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let text = wrapping::text_of(bytes)?;
    let said = |error: serde_json::Error| error.to_string();
    // As a value first: of a key that stands twice, the last counts, as in Python.
    let value: Value = match serde_json::from_slice(text) {
        Ok(value) => value,
        Err(error) => match without_pythons_numbers(text) {
            Cow::Borrowed(_) => return Err(said(error)),
            Cow::Owned(text) => serde_json::from_slice(&text).map_err(said)?,
        },
    };
    serde_json::from_value(value).map_err(said)
}

/// The text with each of Python's numbers that JSON lacks in quotes.
pub fn without_pythons_numbers(text: &[u8]) -> Cow<'_, [u8]> {
    let mut rewritten: Option<Vec<u8>> = None;
    let (mut at, mut kept) = (0, 0);
    while at < text.len() {
        if text[at] == b'"' {
            at = end_of_string(text, at);
            continue;
        }
        match foreign_number(&text[at..]) {
            Some(length) => {
                let out = rewritten.get_or_insert_default();
                out.extend_from_slice(&text[kept..at]);
                out.push(b'"');
                out.extend_from_slice(&text[at..at + length]);
                out.push(b'"');
                at += length;
                kept = at;
            }
            None => at += token_length(&text[at..]),
        }
    }
    match rewritten {
        None => Cow::Borrowed(text),
        Some(mut out) => {
            out.extend_from_slice(&text[kept..]);
            Cow::Owned(out)
        }
    }
}

/// The place behind a string that begins at `start`.
fn end_of_string(text: &[u8], start: usize) -> usize {
    let mut at = start + 1;
    while at < text.len() && text[at] != b'"' {
        at += if text[at] == b'\\' { 2 } else { 1 };
    }
    (at + 1).min(text.len())
}

/// Bytes of a number or word, or one of anything else.
fn token_length(text: &[u8]) -> usize {
    text.iter().take_while(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(byte)).count().max(1)
}

/// Bytes of a number that begins here and that JSON cannot say.
fn foreign_number(text: &[u8]) -> Option<usize> {
    let token = &text[..token_length(text)];
    let named = [&b"NaN"[..], b"Infinity", b"-Infinity"].contains(&token);
    let overflows = || {
        let digits = token.first().is_some_and(|first| first.is_ascii_digit() || *first == b'-');
        let number = std::str::from_utf8(token).ok().filter(|_| digits)?.parse::<f64>().ok()?;
        number.is_infinite().then_some(())
    };
    (named || overflows().is_some()).then_some(token.len())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn pythons_numbers_become_their_names_and_strings_stay() {
        let text =
            br#"{"a": NaN, "b": [-Infinity, Infinity], "c": "NaN, \"Infinity", "d": 1e999, "e": -1.5e3}"#;
        let value: Value = parse(text).expect("read");
        let right = json!({"a": "NaN", "b": ["-Infinity", "Infinity"], "c": "NaN, \"Infinity", "d": "1e999",
            "e": -1500.0});
        assert_eq!(value, right);
        assert!(matches!(without_pythons_numbers(br#"{"NaN": "-Infinity"}"#), Cow::Borrowed(_)));
    }

    #[test]
    fn what_is_no_json_stays_none() {
        for text in ["{\"a\": nan}", "{\"a\": Infinit}", "{", "\"", "\"\\", "{\"a\": -}", "NaNNaN"] {
            let error = parse::<Value>(text.as_bytes()).expect_err(text);
            assert!(error.contains("line 1"), "{error}");
        }
        assert_eq!(parse::<Value>(b"\xef\xbb\xbf{\"a\": 1}"), Ok(json!({"a": 1})));
        let twice = parse::<std::collections::BTreeMap<String, u32>>(br#"{"a": 1, "a": 2}"#).expect("read");
        assert_eq!(twice["a"], 2);
    }
}
