//! Values as Python writes them: `str()` and `repr()`.

use std::fmt::Write as _;

use super::value::{PyValue, View};

impl PyValue {
    /// `str()`.
    pub fn to_text(&self) -> String {
        match self {
            PyValue::Text(text) => text.to_string(),
            PyValue::Undefined(_) => String::new(),
            other => {
                let mut out = String::new();
                other.write_repr(&mut out);
                out
            }
        }
    }

    /// `repr()`.
    pub fn write_repr(&self, out: &mut String) {
        let _ = match self {
            PyValue::Undefined(_) => write!(out, "Undefined"),
            PyValue::None => write!(out, "None"),
            PyValue::Bool(true) => write!(out, "True"),
            PyValue::Bool(false) => write!(out, "False"),
            PyValue::Int(value) => write!(out, "{value}"),
            PyValue::Float(value) => write!(out, "{}", float(*value)),
            PyValue::Text(text) => {
                quote(text, out);
                Ok(())
            }
            PyValue::List(list) if list.tuple && list.items.len() == 1 => {
                out.push('(');
                list.items[0].write_repr(out);
                write!(out, ",)")
            }
            PyValue::List(list) => {
                let (open, close) = if list.tuple { ('(', ')') } else { ('[', ']') };
                write_items(&list.items, (open, close), out);
                Ok(())
            }
            PyValue::Dict(dict) => {
                out.push('{');
                for (at, (key, value)) in dict.entries().iter().enumerate() {
                    out.push_str(if at == 0 { "" } else { ", " });
                    key.write_repr(out);
                    out.push_str(": ");
                    value.write_repr(out);
                }
                write!(out, "}}")
            }
            PyValue::View(View::Keys | View::Values | View::Items, _) => {
                let _ = write!(out, "{}(", self.type_name());
                write_items(&self.iterate().unwrap_or_default(), ('[', ']'), out);
                write!(out, ")")
            }
            PyValue::Range(start, stop, 1) => write!(out, "range({start}, {stop})"),
            PyValue::Range(start, stop, step) => write!(out, "range({start}, {stop}, {step})"),
            PyValue::Loop(round) => write!(out, "<LoopContext {}/{}>", round.index + 1, round.items.len()),
            // Python shows addresses here.
            PyValue::Method(method) => write!(out, "<built-in method {}>", method.1),
            other => write!(out, "<{}>", other.type_name()),
        };
    }
}

fn write_items(items: &[PyValue], (open, close): (char, char), out: &mut String) {
    out.push(open);
    for (at, item) in items.iter().enumerate() {
        out.push_str(if at == 0 { "" } else { ", " });
        item.write_repr(out);
    }
    out.push(close);
}

/// The shortest digits that read back as the number; an exponent below 1e-4 and from 1e16 on.
pub fn float(value: f64) -> String {
    if value.is_nan() {
        return "nan".into();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf".into() } else { "-inf".into() };
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = value.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// A string with quotes and escapes.
fn quote(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        let code = c as u32;
        let _ = match c {
            '\\' => write!(out, "\\\\"),
            '\n' => write!(out, "\\n"),
            '\r' => write!(out, "\\r"),
            '\t' => write!(out, "\\t"),
            c if c == mark => write!(out, "\\{c}"),
            c if is_printable(c) => write!(out, "{c}"),
            _ if code <= 0xFF => write!(out, "\\x{code:02x}"),
            _ if code <= 0xFFFF => write!(out, "\\u{code:04x}"),
            _ => write!(out, "\\U{code:08x}"),
        };
    }
    out.push(mark);
}

/// `str.isprintable` of one character: neither control, format, unassigned nor a separator but the space.
pub fn is_printable(c: char) -> bool {
    if c.is_ascii() {
        return matches!(c, ' '..='~');
    }
    // The standard library escapes for debugging what is not printable; behind another character, not what
    // only combines.
    let mut text = String::from("a");
    text.push(c);
    text.escape_debug().eq(text.chars())
}
