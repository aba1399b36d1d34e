//! JSON as Python's `json` module reads and writes it: integers stay integers of any size that is kept, floats are
//! written as `repr()` writes them, and the order of fields is kept.

use std::fmt::Write as _;

use super::arguments::{Given, optional_text};
use super::value::{Dict, PyValue};
use super::{Outcome, print, raise};

/// Widest indentation of `tojson`.
const INDENT_MAX: i128 = 64;

/// Values that `serde_json` has read. What it read as a float and was an integer stays a float here: [`parse`] reads
/// such numbers from the text.
impl From<&serde_json::Value> for PyValue {
    fn from(json: &serde_json::Value) -> PyValue {
        match json {
            serde_json::Value::Null => PyValue::None,
            serde_json::Value::Bool(value) => PyValue::Bool(*value),
            serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
                (Some(value), _, _) => PyValue::Int(value.into()),
                (_, Some(value), _) => PyValue::Int(value.into()),
                (_, _, value) => PyValue::Float(value.unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(text) => PyValue::text(text.as_str()),
            serde_json::Value::Array(items) => {
                // `serde_json` reads at most 128 levels, which is below the limit of values.
                PyValue::list(items.iter().map(PyValue::from).collect()).unwrap_or(PyValue::None)
            }
            serde_json::Value::Object(map) => {
                let mut dict = Dict::default();
                for (name, value) in map {
                    dict.insert(PyValue::text(name.as_str()), PyValue::from(value));
                }
                PyValue::dict(dict).unwrap_or(PyValue::None)
            }
        }
    }
}

/// The filter `tojson`: `json.dumps` with transformers' arguments.
pub fn tojson(value: &PyValue, given: &Given) -> Outcome<PyValue> {
    let [ascii, indent, separators, sort] =
        given.bind("tojson", ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let indent = match indent {
        None | Some(PyValue::None) => None,
        Some(PyValue::Text(text)) => Some(text.to_string()),
        Some(other) => match other.as_int() {
            Some(width) if width <= INDENT_MAX => Some(" ".repeat(usize::try_from(width).unwrap_or(0))),
            Some(width) => return raise(format!("tojson: indent {width} is above {INDENT_MAX}")),
            None => return raise(format!("tojson: indent must be int or str, not {}", other.type_name())),
        },
    };
    let (item, key) = match separators {
        None | Some(PyValue::None) if indent.is_some() => (",".into(), ": ".into()),
        None | Some(PyValue::None) => (", ".into(), ": ".into()),
        Some(pair) => {
            let pair = pair.iterate()?;
            let [item, key] = pair.as_slice() else {
                return raise("tojson: separators must be a pair of strings");
            };
            let text =
                |value| optional_text("tojson", Some(value)).map(|text| text.unwrap_or_default().to_string());
            (text(item)?, text(key)?)
        }
    };
    let is_true = |value: Option<PyValue>| value.is_some_and(|value| value.is_true());
    let mut writer =
        Writer { ascii: is_true(ascii), sort: is_true(sort), indent, item, key, out: String::new() };
    writer.write(value, 0)?;
    Ok(PyValue::text(writer.out))
}

struct Writer {
    ascii: bool,
    sort: bool,
    indent: Option<String>,
    item: String,
    key: String,
    out: String,
}

impl Writer {
    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn next(&mut self, at: usize, depth: usize) {
        if at > 0 {
            self.out.push_str(&self.item);
        }
        self.line(depth);
    }

    fn write(&mut self, value: &PyValue, depth: usize) -> Outcome<()> {
        match value {
            PyValue::Text(text) => self.quote(text),
            PyValue::List(list) if list.items.is_empty() => self.out.push_str("[]"),
            PyValue::List(list) => {
                self.out.push('[');
                for (at, item) in list.items.iter().enumerate() {
                    self.next(at, depth + 1);
                    self.write(item, depth + 1)?;
                }
                self.line(depth);
                self.out.push(']');
            }
            PyValue::Dict(dict) if dict.entries().is_empty() => self.out.push_str("{}"),
            PyValue::Dict(dict) => {
                self.out.push('{');
                let mut entries: Vec<&(PyValue, PyValue)> = dict.entries().iter().collect();
                if self.sort {
                    let mut less = |a: &&(PyValue, PyValue), b: &&(PyValue, PyValue)| {
                        Ok(a.0.order(&b.0, "<")?.is_some_and(|o| o.is_lt()))
                    };
                    entries = super::value::sorted(entries, &mut less)?;
                }
                for (at, (key, value)) in entries.into_iter().enumerate() {
                    self.next(at, depth + 1);
                    match key {
                        PyValue::Text(text) => self.quote(text),
                        other => {
                            let mut plain = Writer { out: String::new(), indent: None, ..Writer::plain() };
                            plain.write_plain(other)?;
                            self.quote(&plain.out);
                        }
                    }
                    self.out.push_str(&self.key);
                    self.write(value, depth + 1)?;
                }
                self.line(depth);
                self.out.push('}');
            }
            other => self.write_plain(other)?,
        }
        Ok(())
    }

    fn plain() -> Writer {
        Writer {
            ascii: false,
            sort: false,
            indent: None,
            item: String::new(),
            key: String::new(),
            out: String::new(),
        }
    }

    fn write_plain(&mut self, value: &PyValue) -> Outcome<()> {
        match value {
            PyValue::None => self.out.push_str("null"),
            PyValue::Bool(value) => self.out.push_str(if *value { "true" } else { "false" }),
            PyValue::Int(value) => {
                let _ = write!(self.out, "{value}");
            }
            PyValue::Float(value) => self.out.push_str(&match *value {
                value if value.is_nan() => "NaN".to_owned(),
                value if value.is_infinite() && value > 0.0 => "Infinity".to_owned(),
                value if value.is_infinite() => "-Infinity".to_owned(),
                value => print::float(value),
            }),
            other => return raise(format!("Object of type {} is not JSON serializable", other.type_name())),
        }
        Ok(())
    }

    fn quote(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            let _ = match c {
                '"' => write!(self.out, "\\\""),
                '\\' => write!(self.out, "\\\\"),
                '\n' => write!(self.out, "\\n"),
                '\r' => write!(self.out, "\\r"),
                '\t' => write!(self.out, "\\t"),
                '\u{8}' => write!(self.out, "\\b"),
                '\u{C}' => write!(self.out, "\\f"),
                c if (c as u32) < 0x20 => write!(self.out, "\\u{:04x}", c as u32),
                c if self.ascii && !c.is_ascii() => {
                    let mut units = [0; 2];
                    c.encode_utf16(&mut units).iter().try_for_each(|unit| write!(self.out, "\\u{unit:04x}"))
                }
                c => write!(self.out, "{c}"),
            };
        }
        self.out.push('"');
    }
}

/// Reads JSON that `serde_json` has accepted, with each number as it is written.
///
/// # Errors
/// When an integer does not fit into 127 bits; the message names its first digits.
pub fn parse(text: &str) -> Result<PyValue, String> {
    let mut reader = Reader { text, at: 0 };
    reader.value().map_err(|raised| raised.message)
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    /// Steps over a value; gives its text.
    fn skip(&mut self) -> &'a str {
        self.peek();
        let (bytes, begin) = (self.text.as_bytes(), self.at);
        let (mut depth, mut inside) = (0_usize, false);
        while let Some(&byte) = bytes.get(self.at) {
            match byte {
                b'\\' if inside => self.at += 1,
                b'"' => inside = !inside,
                _ if inside => {}
                b'[' | b'{' => depth += 1,
                b']' | b'}' if depth == 0 => break,
                b']' | b'}' => depth -= 1,
                b',' if depth == 0 => break,
                _ => {}
            }
            self.at += 1;
        }
        self.text.get(begin..self.at.min(bytes.len())).unwrap_or_default().trim_end()
    }

    fn peek(&mut self) -> u8 {
        let bytes = self.text.as_bytes();
        while bytes.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        bytes.get(self.at).copied().unwrap_or(0)
    }

    /// Steps over a separator; returns whether the closing one was read.
    fn closes(&mut self, close: u8) -> bool {
        let found = self.peek();
        self.at += 1;
        found == close || found == 0
    }

    /// The length of the token that stands here.
    fn token(&mut self) -> &'a str {
        let rest = &self.text[self.at.min(self.text.len())..];
        let end = rest.find(|c: char| matches!(c, ',' | ']' | '}' | ':') || c.is_ascii_whitespace());
        let token = &rest[..end.unwrap_or(rest.len())];
        self.at += token.len().max(1);
        token
    }

    fn string(&mut self) -> Outcome<String> {
        let begin = self.at;
        let bytes = self.text.as_bytes();
        self.at += 1;
        while self.at < bytes.len() && bytes[self.at] != b'"' {
            self.at += if bytes[self.at] == b'\\' { 2 } else { 1 };
        }
        self.at += 1;
        let quoted = self.text.get(begin..self.at).unwrap_or_default();
        serde_json::from_str(quoted).or_else(|error| raise(error.to_string()))
    }

    fn value(&mut self) -> Outcome<PyValue> {
        match self.peek() {
            b'"' => self.string().map(PyValue::text),
            b'[' => {
                self.at += 1;
                let mut items = Vec::new();
                if self.peek() == b']' {
                    self.at += 1;
                    return PyValue::list(items);
                }
                loop {
                    items.push(self.value()?);
                    if self.closes(b']') {
                        return PyValue::list(items);
                    }
                }
            }
            b'{' => {
                self.at += 1;
                let mut dict = Dict::default();
                if self.peek() == b'}' {
                    self.at += 1;
                    return PyValue::dict(dict);
                }
                loop {
                    self.peek();
                    let name = self.string()?;
                    self.peek();
                    self.at += 1;
                    dict.insert(PyValue::text(name), self.value()?);
                    if self.closes(b'}') {
                        return PyValue::dict(dict);
                    }
                }
            }
            _ => match self.token() {
                "null" => Ok(PyValue::None),
                "true" => Ok(PyValue::Bool(true)),
                "false" => Ok(PyValue::Bool(false)),
                number if number.contains(['.', 'e', 'E']) => match number.parse() {
                    Ok(value) => Ok(PyValue::Float(value)),
                    Err(_) => raise("not a number"),
                },
                number => match number.parse() {
                    Ok(value) => Ok(PyValue::Int(value)),
                    Err(_) => {
                        let shown: String = number.chars().take(40).collect();
                        raise(format!("the integer {shown} does not fit into 127 bits"))
                    }
                },
            },
        }
    }
}

/// The text of a field of a JSON object that `serde_json` has accepted; of several, the last, as `serde_json` reads.
pub fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut reader = Reader { text, at: 0 };
    if reader.peek() != b'{' {
        return None;
    }
    reader.at += 1;
    let mut found = None;
    while reader.peek() == b'"' {
        let this = reader.string().ok()?;
        reader.peek();
        reader.at += 1;
        let value = reader.skip();
        if this == name {
            found = Some(value);
        }
        if reader.closes(b'}') {
            break;
        }
    }
    found
}

/// The texts of the elements of a JSON array that `serde_json` has accepted.
pub fn elements(text: &str) -> Vec<&str> {
    let mut reader = Reader { text, at: 0 };
    let mut found = Vec::new();
    if reader.peek() != b'[' {
        return found;
    }
    reader.at += 1;
    if reader.peek() == b']' {
        return found;
    }
    loop {
        found.push(reader.skip());
        if reader.closes(b']') {
            return found;
        }
    }
}
