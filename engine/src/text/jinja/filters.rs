//! Jinja2's filters on single values. Those on sequences stand in [`super::sequences`].

use super::arguments::{Given, integer, text};
use super::run::Machine;
use super::value::PyValue;
use super::{Outcome, evaluate, format, json, operators, raise, sequences};

/// Filters of this file.
const NAMES: [&str; 27] = [
    "abs",
    "attr",
    "capitalize",
    "center",
    "d",
    "default",
    "e",
    "escape",
    "filesizeformat",
    "float",
    "forceescape",
    "format",
    "indent",
    "int",
    "items",
    "lower",
    "replace",
    "round",
    "safe",
    "string",
    "striptags",
    "title",
    "tojson",
    "trim",
    "truncate",
    "upper",
    "wordcount",
];

/// Whether there is a filter of the name.
pub fn is_known(name: &str) -> bool {
    NAMES.contains(&name) || sequences::NAMES.contains(&name)
}

/// Runs a filter.
pub fn apply(machine: &mut Machine<'_>, name: &str, of: PyValue, given: Given) -> Outcome<PyValue> {
    if sequences::NAMES.contains(&name) {
        return sequences::apply(machine, name, of, given);
    }
    match name {
        "default" | "d" => {
            let [default, boolean] = given.bind(name, ["default_value", "boolean"])?;
            let replace = matches!(of, PyValue::Undefined(_))
                || (boolean.is_some_and(|boolean| boolean.is_true()) && !of.is_true());
            Ok(if replace { default.unwrap_or_else(|| PyValue::text("")) } else { of })
        }
        "tojson" => json::tojson(&of, &given),
        "items" => match &of {
            PyValue::Undefined(_) => PyValue::iterator(Vec::new()),
            PyValue::Dict(dict) => PyValue::iterator(evaluate::items(dict)?),
            _ => raise("Can only get item pairs from a mapping."),
        },
        "attr" => {
            let [attribute] = given.bind(name, ["name"])?;
            let attribute = text(name, &attribute.unwrap_or(PyValue::None))?;
            match &of {
                // The item of a mapping is none of its attributes.
                PyValue::Dict(_) => Ok(super::methods::attribute(&of, &attribute).unwrap_or_else(|| {
                    PyValue::undefined(format!("'dict object' has no attribute '{attribute}'"))
                })),
                other => machine.attribute(other, &attribute),
            }
        }
        "abs" | "float" | "int" | "round" | "filesizeformat" => number(name, &of, &given),
        "format" => {
            let arguments = if given.named.is_empty() {
                PyValue::tuple(given.positional)?
            } else if given.positional.is_empty() {
                let mut dict = super::value::Dict::default();
                given.named.into_iter().for_each(|(name, value)| dict.insert(PyValue::text(name), value));
                PyValue::dict(dict)?
            } else {
                return raise("can't handle positional and keyword arguments at the same time");
            };
            format::percent(&of.to_text(), &arguments).map(PyValue::text)
        }
        _ => on_text(name, &of, &given, machine.bounds.bytes),
    }
}

fn on_text(name: &str, of: &PyValue, given: &Given, bytes_max: usize) -> Outcome<PyValue> {
    let this = of.to_text();
    let made = match name {
        "capitalize" | "lower" | "upper" => super::text::cased(&this, name),
        "string" | "safe" => match of {
            PyValue::Text(_) => return Ok(of.clone()),
            _ => this,
        },
        "e" | "escape" | "forceescape" => escape(&this),
        "title" => title(&this),
        "striptags" => strip_tags(&this),
        "wordcount" => {
            let words =
                this.split(|c: char| c != '_' && !c.is_alphanumeric()).filter(|word| !word.is_empty());
            return Ok(PyValue::Int(words.count() as i128));
        }
        "trim" => {
            let [chars] = given.bind(name, ["chars"])?;
            let given = Given::of(chars.into_iter().collect());
            return super::text::call(&this, "strip", &given, bytes_max);
        }
        "center" => {
            let [width] = given.bind(name, ["width"])?;
            let given = Given::of(vec![width.unwrap_or(PyValue::Int(80))]);
            return super::text::call(&this, "center", &given, bytes_max);
        }
        "replace" => {
            let [old, new, count] = given.bind(name, ["old", "new", "count"])?;
            let part = |value: Option<PyValue>| value.map(|value| value.to_text()).unwrap_or_default();
            let count = count.filter(|count| !matches!(count, PyValue::None));
            let count = integer(name, count.as_ref(), -1)?;
            super::text::replace(&this, &part(old), &part(new), (count, bytes_max))?
        }
        "indent" => indent(of, given, bytes_max)?,
        _ => truncate(&this, given)?,
    };
    Ok(PyValue::text(made))
}

fn escape(this: &str) -> String {
    let mut out = String::with_capacity(this.len());
    for c in this.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Words begin behind white space, `-` and opening brackets.
fn title(this: &str) -> String {
    let mut begins = true;
    let mut out = String::with_capacity(this.len());
    for c in this.chars() {
        if super::text::is_space(c) || matches!(c, '-' | '(' | '{' | '[' | '<') {
            begins = true;
            out.push(c);
        } else if std::mem::take(&mut begins) {
            out.extend(c.to_uppercase());
        } else {
            out.extend(c.to_lowercase());
        }
    }
    out
}

fn strip_tags(this: &str) -> String {
    let mut rest = this.to_owned();
    for (open, close) in [("<!--", "-->"), ("<", ">")] {
        let mut out = String::new();
        let mut from = rest.as_str();
        while let Some(at) = from.find(open) {
            let Some(end) = from[at..].find(close) else { break };
            out.push_str(&from[..at]);
            from = &from[at + end + close.len()..];
        }
        rest = out + from;
    }
    rest.split(super::text::is_space).filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

fn indent(of: &PyValue, given: &Given, bytes_max: usize) -> Outcome<String> {
    let [width, first, blank] = given.bind("indent", ["width", "first", "blank"])?;
    let PyValue::Text(this) = of else {
        return raise(format!("indent: expected str, found {}", of.type_name()));
    };
    let margin = match &width {
        Some(PyValue::Text(margin)) => margin.to_string(),
        other => {
            let width = usize::try_from(integer("indent", other.as_ref(), 4)?.max(0)).unwrap_or(usize::MAX);
            if width > bytes_max {
                return raise(format!("a text of more than {bytes_max} bytes"));
            }
            " ".repeat(width)
        }
    };
    let is_true = |value: Option<PyValue>| value.is_some_and(|value| value.is_true());
    let (first, blank) = (is_true(first), is_true(blank));
    let whole = format!("{this}\n");
    let lines = super::text::lines(&whole, false);
    if whole.len() + lines.len().saturating_mul(margin.len()) > bytes_max {
        return raise(format!("a text of more than {bytes_max} bytes"));
    }
    let mut out = String::new();
    for (at, line) in lines.into_iter().enumerate() {
        if at > 0 {
            out.push('\n');
        }
        if (at == 0 && first) || (at > 0 && (blank || !line.is_empty())) {
            out.push_str(&margin);
        }
        out.push_str(line);
    }
    Ok(out)
}

fn truncate(this: &str, given: &Given) -> Outcome<String> {
    let [length, kill, end, leeway] = given.bind("truncate", ["length", "killwords", "end", "leeway"])?;
    let end = end.map_or_else(|| "...".to_owned(), |end| end.to_text());
    let length = integer("truncate", length.as_ref(), 255)?;
    let leeway = integer("truncate", leeway.as_ref().filter(|value| !matches!(value, PyValue::None)), 5)?;
    let ends = end.chars().count() as i128;
    if length < ends {
        return raise(format!("expected length >= {ends}, got {length}"));
    }
    if leeway < 0 {
        return raise(format!("expected leeway >= 0, got {leeway}"));
    }
    if this.chars().count() as i128 <= length.saturating_add(leeway) {
        return Ok(this.to_owned());
    }
    let cut: String = this.chars().take(usize::try_from(length - ends).unwrap_or(0)).collect();
    let whole_words = !kill.is_some_and(|kill| kill.is_true());
    let kept = if whole_words { cut.rsplit_once(' ').map_or(cut.as_str(), |(kept, _)| kept) } else { &cut };
    Ok(format!("{kept}{end}"))
}

fn number(name: &str, of: &PyValue, given: &Given) -> Outcome<PyValue> {
    match name {
        "abs" => match of {
            PyValue::Float(value) => Ok(PyValue::Float(value.abs())),
            other => match other.as_int() {
                Some(value) => Ok(PyValue::Int(value.abs())),
                None => raise(format!("bad operand type for abs(): '{}'", other.type_name())),
            },
        },
        "float" => {
            let [default] = given.bind(name, ["default"])?;
            if let PyValue::Undefined(message) = of {
                return raise(&**message);
            }
            Ok(to_float(of).map_or_else(|| default.unwrap_or(PyValue::Float(0.0)), PyValue::Float))
        }
        "int" => {
            let [default, base] = given.bind(name, ["default", "base"])?;
            if let PyValue::Undefined(message) = of {
                return raise(&**message);
            }
            let base = u32::try_from(integer(name, base.as_ref(), 10)?).unwrap_or(10);
            let whole = match of {
                PyValue::Text(text) => parse_int(text, base),
                other => other.as_int(),
            };
            let whole = whole.or_else(|| {
                to_float(of)
                    .filter(|value| value.is_finite() && value.abs() < 1e38)
                    .map(|value| value.trunc() as i128)
            });
            Ok(whole.map_or_else(|| default.unwrap_or(PyValue::Int(0)), PyValue::Int))
        }
        "round" => round(of, given),
        _ => file_size(of, given),
    }
}

fn digits(text: &str) -> Option<String> {
    let text = text.trim_matches(super::text::is_space);
    let sound = !text.starts_with('_') && !text.ends_with('_') && !text.contains("__");
    sound.then(|| text.replace('_', ""))
}

fn parse_int(text: &str, base: u32) -> Option<i128> {
    let text = digits(text)?;
    let (sign, size) = match text.strip_prefix('-') {
        Some(size) => (-1, size),
        None => (1, text.strip_prefix('+').unwrap_or(&text)),
    };
    let prefix = match base {
        2 => "0b",
        8 => "0o",
        16 => "0x",
        _ => "",
    };
    let lower = size.to_ascii_lowercase();
    let size = lower.strip_prefix(prefix).unwrap_or(&lower);
    if !(2..=36).contains(&base) || size.starts_with(['+', '-']) {
        return None;
    }
    i128::from_str_radix(size, base).ok().map(|size| sign * size)
}

fn to_float(value: &PyValue) -> Option<f64> {
    match value {
        PyValue::Text(text) => {
            let text = digits(text)?.to_ascii_lowercase();
            text.parse().ok()
        }
        other => other.as_float(),
    }
}

fn round(of: &PyValue, given: &Given) -> Outcome<PyValue> {
    let [precision, method] = given.bind("round", ["precision", "method"])?;
    let precision = integer("round", precision.as_ref(), 0)?.clamp(-300, 300) as i32;
    let method = method.map_or_else(|| "common".to_owned(), |method| method.to_text());
    let Some(value) = of.as_float() else {
        return raise(format!("type {} doesn't define __round__ method", of.type_name()));
    };
    let scale = 10f64.powi(precision);
    match method.as_str() {
        "common" => match (of.as_int(), precision) {
            (Some(whole), 0..) => Ok(PyValue::Int(whole)),
            // Rounding by decimal digits goes to the even one of two that are as near.
            (_, 0..) => {
                let digits = usize::try_from(precision).unwrap_or(0);
                let rounded = format!("{value:.digits$}");
                Ok(PyValue::Float(rounded.parse().unwrap_or(value)))
            }
            (whole, _) => {
                let size = 10f64.powi(-precision);
                let rounded = (value / size).round_ties_even() * size;
                Ok(if whole.is_some() { PyValue::Int(rounded as i128) } else { PyValue::Float(rounded) })
            }
        },
        "ceil" => Ok(PyValue::Float((value * scale).ceil() / scale)),
        "floor" => Ok(PyValue::Float((value * scale).floor() / scale)),
        _ => raise("method must be common, ceil or floor"),
    }
}

fn file_size(of: &PyValue, given: &Given) -> Outcome<PyValue> {
    let [binary] = given.bind("filesizeformat", ["binary"])?;
    let Some(bytes) = to_float(of) else {
        return raise(format!("could not convert to float: {}", of.to_text()));
    };
    let binary = binary.is_some_and(|binary| binary.is_true());
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    let made = if bytes == 1.0 {
        "1 Byte".to_owned()
    } else if bytes < base {
        format!("{} Bytes", bytes.trunc())
    } else {
        let letters = if binary { "KMGTPEZY" } else { "kMGTPEZY" };
        let mut unit = base * base;
        let mut letters = letters.chars().peekable();
        let mut letter = letters.next().unwrap_or('Y');
        while bytes >= unit && letters.peek().is_some() {
            unit *= base;
            letter = letters.next().unwrap_or('Y');
        }
        format!("{:.1} {letter}{}", base * bytes / unit, if binary { "iB" } else { "B" })
    };
    Ok(PyValue::text(made))
}

/// `a + b`, for `sum`.
pub fn add(a: &PyValue, b: &PyValue, bytes_max: usize) -> Outcome<PyValue> {
    operators::binary(super::syntax::BinaryOp::Add, a, b, bytes_max)
}
