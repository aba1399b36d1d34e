//! Python's two ways to format: `'%s' % values` and `'{}'.format(values)`.

use std::fmt::Write as _;

use super::arguments::Given;
use super::print;
use super::value::PyValue;
use super::{Outcome, operators, raise};

/// Widest field and most digits.
const WIDTH_MAX: usize = 4096;

/// How one value is written.
#[derive(Debug, Default)]
struct Spec {
    fill: Option<char>,
    /// `<`, `>`, `^` or `=`.
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

/// `template % arguments`.
pub fn percent(template: &str, arguments: &PyValue) -> Outcome<String> {
    let tuple = match arguments {
        PyValue::List(list) if list.tuple => list.items.clone(),
        other => vec![other.clone()],
    };
    let (mut values, mut by_name) = (tuple.into_iter(), false);
    let mut out = String::new();
    let mut rest = template;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let mut source = None;
        if let Some(named) = rest.strip_prefix('(') {
            let Some((name, after)) = named.split_once(')') else { return raise("incomplete format key") };
            let PyValue::Dict(dict) = arguments else { return raise("format requires a mapping") };
            let Some(value) = dict.get_text(name) else { return raise(format!("'{name}'")) };
            (source, by_name, rest) = (Some(value.clone()), true, after);
        }
        let mut next = || match source.take().or_else(|| values.next()) {
            Some(value) => Ok(value),
            None => raise("not enough arguments for format string"),
        };
        let mut spec = Spec::default();
        while let Some(flag) = rest.chars().next().filter(|c| matches!(c, '-' | '+' | ' ' | '#' | '0')) {
            match flag {
                '-' => spec.align = Some('<'),
                '0' if spec.align.is_none() => (spec.fill, spec.align) = (Some('0'), Some('=')),
                '#' => spec.alternate = true,
                '0' => {}
                sign => spec.sign = Some(sign),
            }
            rest = &rest[1..];
        }
        spec.width = number(&mut rest, &mut next)?.unwrap_or(0);
        if let Some(after) = rest.strip_prefix('.') {
            rest = after;
            spec.precision = Some(number(&mut rest, &mut next)?.unwrap_or(0));
        }
        rest = rest.trim_start_matches(['h', 'l', 'L']);
        let Some(kind) = rest.chars().next() else { return raise("incomplete format") };
        rest = &rest[kind.len_utf8()..];
        if kind == '%' {
            out.push('%');
            continue;
        }
        percent_value(kind, &next()?, spec, &mut out)?;
    }
    out.push_str(rest);
    let all_used = values.next().is_none()
        || by_name
        || matches!(arguments, PyValue::Dict(_) | PyValue::List(_) if !is_tuple(arguments));
    if all_used { Ok(out) } else { raise("not all arguments converted during string formatting") }
}

fn is_tuple(value: &PyValue) -> bool {
    matches!(value, PyValue::List(list) if list.tuple)
}

/// Digits, or `*` for the next value.
fn number(rest: &mut &str, next: &mut dyn FnMut() -> Outcome<PyValue>) -> Outcome<Option<usize>> {
    if let Some(after) = rest.strip_prefix('*') {
        *rest = after;
        return match next()?.as_int().and_then(|width| usize::try_from(width).ok()) {
            Some(width) if width <= WIDTH_MAX => Ok(Some(width)),
            _ => raise(format!("* wants an int up to {WIDTH_MAX}")),
        };
    }
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (digits, after) = rest.split_at(end);
    *rest = after;
    if digits.is_empty() {
        return Ok(None);
    }
    match digits.parse() {
        Ok(width) if width <= WIDTH_MAX => Ok(Some(width)),
        _ => raise(format!("the width {digits} exceeds {WIDTH_MAX}")),
    }
}

fn percent_value(kind: char, value: &PyValue, mut spec: Spec, out: &mut String) -> Outcome<()> {
    spec.align.get_or_insert('>');
    let text = match kind {
        's' => value.to_text(),
        'r' => repr(value),
        'a' => ascii(&repr(value)),
        'c' => match (value, value.as_int()) {
            (PyValue::Text(text), _) if text.chars().count() == 1 => text.to_string(),
            (_, Some(code)) => match u32::try_from(code).ok().and_then(char::from_u32) {
                Some(c) => c.to_string(),
                None => return raise("%c arg not in range(0x110000)"),
            },
            _ => return raise("%c requires int or char"),
        },
        'd' | 'i' | 'u' => {
            let whole = match value {
                PyValue::Float(number) if number.is_finite() => Some(number.trunc() as i128),
                other => other.as_int(),
            };
            let Some(whole) = whole else {
                return raise(format!(
                    "%{kind} format: a real number is required, not {}",
                    value.type_name()
                ));
            };
            spec.kind = Some('d');
            return write_number(&PyValue::Int(whole), &spec, out);
        }
        'x' | 'X' | 'o' if value.as_int().is_some() => {
            spec.kind = Some(kind);
            return write_number(value, &spec, out);
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let Some(number) = value.as_float() else {
                return raise(format!("must be real number, not {}", value.type_name()));
            };
            spec.kind = Some(kind);
            return write_number(&PyValue::Float(number), &spec, out);
        }
        'x' | 'X' | 'o' => {
            return raise(format!("%{kind} format: an integer is required, not {}", value.type_name()));
        }
        other => return raise(format!("unsupported format character '{other}'")),
    };
    let text = match spec.precision {
        Some(most) => text.chars().take(most).collect(),
        None => text,
    };
    // Zeros fill numbers alone.
    let align = if spec.align == Some('=') { '>' } else { spec.align.unwrap_or('>') };
    pad("", &text, &Spec { fill: None, align: Some(align), ..spec }, out);
    Ok(())
}

fn repr(value: &PyValue) -> String {
    let mut out = String::new();
    value.write_repr(&mut out);
    out
}

fn ascii(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        let code = c as u32;
        let _ = match code {
            0..0x80 => write!(out, "{c}"),
            0x80..0x100 => write!(out, "\\x{code:02x}"),
            0x100..0x10000 => write!(out, "\\u{code:04x}"),
            _ => write!(out, "\\U{code:08x}"),
        };
    }
    out
}

fn pad(sign: &str, body: &str, spec: &Spec, out: &mut String) {
    let fill = spec.fill.unwrap_or(' ');
    let missing = spec.width.saturating_sub(sign.chars().count() + body.chars().count());
    let left = match spec.align {
        Some('>') => missing,
        Some('^') => missing / 2,
        _ => 0,
    };
    let inner = if spec.align == Some('=') { missing } else { 0 };
    out.extend(std::iter::repeat_n(fill, left));
    out.push_str(sign);
    out.extend(std::iter::repeat_n(fill, inner));
    out.push_str(body);
    out.extend(std::iter::repeat_n(fill, missing - left - inner));
}

fn write_number(value: &PyValue, spec: &Spec, out: &mut String) -> Outcome<()> {
    let (negative, mut body) = match (value, spec.kind) {
        (_, Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%')) | (PyValue::Float(_), _) => {
            let number = value.as_float().unwrap_or(0.0);
            (number.is_sign_negative() && !number.is_nan(), float_digits(number.abs(), spec)?)
        }
        (_, kind) => {
            let number = value.as_int().unwrap_or(0);
            let size = number.unsigned_abs();
            let (prefix, digits) = match kind {
                Some('x') => ("0x", format!("{size:x}")),
                Some('X') => ("0X", format!("{size:X}")),
                Some('o') => ("0o", format!("{size:o}")),
                Some('b') => ("0b", format!("{size:b}")),
                Some('c') => (
                    "",
                    u32::try_from(size).ok().and_then(char::from_u32).map_or_else(String::new, String::from),
                ),
                None | Some('d' | 'n') => ("", size.to_string()),
                Some(other) => {
                    return raise(format!(
                        "Unknown format code '{other}' for object of type '{}'",
                        value.type_name()
                    ));
                }
            };
            let digits = match spec.precision {
                Some(least) if digits.len() < least => "0".repeat(least - digits.len()) + &digits,
                _ => digits,
            };
            (number < 0, if spec.alternate { format!("{prefix}{digits}") } else { digits })
        }
    };
    if let Some(separator) = spec.grouping {
        body = grouped(&body, separator);
    }
    let sign = match (negative, spec.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    pad(
        sign,
        &body,
        &Spec { align: spec.align.or(Some('>')), fill: spec.fill, width: spec.width, ..Spec::default() },
        out,
    );
    Ok(())
}

fn grouped(body: &str, separator: char) -> String {
    let end = body.find(|c: char| !c.is_ascii_digit()).unwrap_or(body.len());
    let mut out = String::new();
    for (at, digit) in body[..end].chars().enumerate() {
        if at > 0 && (end - at) % 3 == 0 {
            out.push(separator);
        }
        out.push(digit);
    }
    out + &body[end..]
}

/// A float that is not negative.
fn float_digits(number: f64, spec: &Spec) -> Outcome<String> {
    if !number.is_finite() {
        let text = print::float(number);
        return Ok(if spec.kind.is_some_and(|kind| kind.is_ascii_uppercase()) {
            text.to_uppercase()
        } else {
            text
        });
    }
    let precision = spec.precision.unwrap_or(6);
    Ok(match spec.kind {
        Some('f' | 'F') => format!("{number:.precision$}"),
        Some('%') => format!("{:.precision$}%", number * 100.0),
        Some('e') => scientific(number, precision),
        Some('E') => scientific(number, precision).to_uppercase(),
        Some('g' | 'G' | 'n') => {
            let text = general(number, precision.max(1), spec.alternate);
            if spec.kind == Some('G') { text.to_uppercase() } else { text }
        }
        None if spec.precision.is_some() => {
            let text = general(number, precision.max(1), false);
            if text.contains(['.', 'e']) { text } else { text + ".0" }
        }
        None => print::float(number),
        Some(other) => return raise(format!("Unknown format code '{other}' for object of type 'float'")),
    })
}

fn scientific(number: f64, precision: usize) -> String {
    let text = format!("{number:.precision$e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

fn general(number: f64, precision: usize, keep_zeros: bool) -> String {
    let text = scientific(number, precision - 1);
    let exponent: i32 = text.split_once('e').and_then(|(_, exponent)| exponent.parse().ok()).unwrap_or(0);
    let trim = |digits: &str| match digits.contains('.') && !keep_zeros {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => digits.to_owned(),
    };
    if exponent < -4 || exponent >= i32::try_from(precision).unwrap_or(i32::MAX) {
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "+00"));
        return format!("{}e{exponent}", trim(digits));
    }
    let decimals = usize::try_from(i32::try_from(precision).unwrap_or(0) - 1 - exponent).unwrap_or(0);
    trim(&format!("{number:.decimals$}"))
}

/// How the places of a template are numbered: by it, or by themselves.
#[derive(Default)]
struct Numbering {
    next: usize,
    manual: bool,
}

impl Numbering {
    /// The place of a field that has a number or none; `None` where it has a name.
    fn place(&mut self, field: &str) -> Outcome<Option<usize>> {
        let number = field.parse::<usize>().ok();
        if field.is_empty() {
            if self.manual {
                return raise("cannot switch from manual field specification to automatic field numbering");
            }
            self.next += 1;
            return Ok(Some(self.next - 1));
        }
        if number.is_some() {
            if self.next > 0 {
                return raise("cannot switch from automatic field numbering to manual field specification");
            }
            self.manual = true;
        }
        Ok(number)
    }
}

/// `template.format(...)`.
pub fn braces(template: &str, given: &Given) -> Outcome<String> {
    fill(template, given, &mut Numbering::default(), 0)
}

fn fill(template: &str, given: &Given, counter: &mut Numbering, level: usize) -> Outcome<String> {
    if level > 2 {
        return raise("Max string recursion exceeded");
    }
    let mut out = String::new();
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            out.push_str(brace);
            rest = after;
            continue;
        }
        if brace == "}" {
            return raise("Single '}' encountered in format string");
        }
        let mut depth = 1;
        let end = rest.find(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth == 0
        });
        let Some(end) = end else { return raise("expected '}' before end of string") };
        let (field, after) = rest.split_at(end);
        rest = &after[1..];
        let (field, spec) = field.split_once(':').unwrap_or((field, ""));
        let (name, conversion) = field.split_once('!').map_or((field, None), |(name, how)| (name, Some(how)));
        let value = lookup(name, given, counter)?;
        let value = match conversion {
            None => value,
            Some("s") => PyValue::text(value.to_text()),
            Some("r") => PyValue::text(repr(&value)),
            Some("a") => PyValue::text(ascii(&repr(&value))),
            Some(other) => return raise(format!("Unknown conversion specifier '{other}'")),
        };
        let spec = fill(spec, given, counter, level + 1)?;
        write_value(&value, &spec, &mut out)?;
    }
    out.push_str(rest);
    Ok(out)
}

/// `name`, `0`, or nothing for the next one; then `.attribute` and `[item]`.
fn lookup(name: &str, given: &Given, counter: &mut Numbering) -> Outcome<PyValue> {
    let end = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut rest) = name.split_at(end);
    let found = match counter.place(first)? {
        Some(place) => given.positional.get(place),
        None => given.named.iter().rev().find(|(name, _)| name == first).map(|(_, value)| value),
    };
    let Some(found) = found else { return raise(format!("format: no argument for '{{{name}}}'")) };
    let mut value = found.clone();
    while !rest.is_empty() {
        let (key, after) = match rest.strip_prefix('[') {
            Some(inner) => inner.split_once(']').unwrap_or((inner, "")),
            None => {
                let inner = &rest[1..];
                inner.split_at(inner.find(['.', '[']).unwrap_or(inner.len()))
            }
        };
        let number = key.parse::<i128>().ok().filter(|_| rest.starts_with('['));
        let item = number.map_or_else(|| PyValue::text(key), PyValue::Int);
        let Some(inner) = operators::element(&value, &item) else {
            return raise(format!("format: '{key}' is not there"));
        };
        (value, rest) = (inner, after);
    }
    Ok(value)
}

fn write_value(value: &PyValue, text: &str, out: &mut String) -> Outcome<()> {
    if text.is_empty() {
        out.push_str(&value.to_text());
        return Ok(());
    }
    let spec = parse_spec(text)?;
    match value {
        PyValue::Int(_) | PyValue::Float(_) => write_number(value, &spec, out),
        PyValue::Bool(_) if spec.kind.is_some_and(|kind| kind != 's') => {
            write_number(&PyValue::Int(value.as_int().unwrap_or(0)), &spec, out)
        }
        PyValue::Text(_) | PyValue::Bool(_) if matches!(spec.kind, None | Some('s')) => {
            let text = value.to_text();
            let text = spec.precision.map_or_else(|| text.clone(), |most| text.chars().take(most).collect());
            pad("", &text, &Spec { align: spec.align.or(Some('<')), ..spec }, out);
            Ok(())
        }
        PyValue::Text(_) => {
            raise(format!("Unknown format code '{}' for object of type 'str'", spec.kind.unwrap_or('s')))
        }
        other => raise(format!("unsupported format string passed to {}.__format__", other.type_name())),
    }
}

fn parse_spec(text: &str) -> Outcome<Spec> {
    let mut spec = Spec::default();
    let mut rest: std::collections::VecDeque<char> = text.chars().collect();
    let aligns = |c: Option<&char>| c.is_some_and(|c| matches!(c, '<' | '>' | '^' | '='));
    if aligns(rest.get(1)) {
        (spec.fill, spec.align) = (rest.pop_front(), rest.pop_front());
    } else if aligns(rest.front()) {
        spec.align = rest.pop_front();
    }
    let mut take = |options: &str| match rest.front() {
        Some(c) if options.contains(*c) => rest.pop_front(),
        _ => None,
    };
    spec.sign = take("+- ");
    spec.alternate = take("#").is_some();
    if take("0").is_some() && spec.align.is_none() {
        (spec.fill, spec.align) = (Some('0'), Some('='));
    }
    let digits = |take: &mut dyn FnMut(&str) -> Option<char>| {
        let mut found = String::new();
        while let Some(digit) = take("0123456789") {
            found.push(digit);
        }
        if found.is_empty() {
            return Ok(None);
        }
        match found.parse::<usize>() {
            Ok(width) if width <= WIDTH_MAX => Ok(Some(width)),
            _ => raise(format!("the width {found} exceeds {WIDTH_MAX}")),
        }
    };
    spec.width = digits(&mut take)?.unwrap_or(0);
    spec.grouping = take(",_");
    if take(".").is_some() {
        spec.precision = digits(&mut take)?;
        if spec.precision.is_none() {
            return raise("Format specifier missing precision");
        }
    }
    spec.kind = rest.pop_front();
    if rest.is_empty() { Ok(spec) } else { raise(format!("Invalid format specifier '{text}'")) }
}
