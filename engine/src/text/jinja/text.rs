//! Python's methods of text. Places are counted in characters.

use super::arguments::{Given, integer, optional_text, text};
use super::value::PyValue;
use super::{Outcome, format, print, raise};

/// All of them but `encode`, `maketrans` and `translate`.
pub const METHODS: [&str; 44] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "upper",
    "zfill",
];

/// White space as Python has it.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1C}'..='\u{1F}')
}

/// Calls a method of a text. `bytes_max` bounds the text that comes out.
pub fn call(this: &str, name: &str, given: &Given, bytes_max: usize) -> Outcome<PyValue> {
    let made = |made: String| Ok(PyValue::text(made));
    match name {
        "format" => format::braces(this, given).map(PyValue::text),
        "format_map" => {
            let [mapping] = given.places(name)?;
            let Some(PyValue::Dict(dict)) = mapping else { return raise("format_map: expected a mapping") };
            let named = dict.entries().iter().map(|(key, value)| (key.to_text(), value.clone())).collect();
            format::braces(this, &Given { positional: Vec::new(), named }).map(PyValue::text)
        }
        "join" => {
            let [parts] = given.places(name)?;
            let mut out = String::new();
            for (at, part) in parts.unwrap_or(PyValue::None).iterate()?.iter().enumerate() {
                let PyValue::Text(part) = part else {
                    let found = part.type_name();
                    return raise(format!("sequence item {at}: expected str instance, {found} found"));
                };
                out.push_str(if at == 0 { "" } else { this });
                out.push_str(part);
                if out.len() > bytes_max {
                    return raise(format!("a text of more than {bytes_max} bytes"));
                }
            }
            made(out)
        }
        "replace" => {
            let [old, new, count] = given.bind(name, ["old", "new", "count"])?;
            let (old, new) =
                (text(name, &old.unwrap_or(PyValue::None))?, text(name, &new.unwrap_or(PyValue::None))?);
            replace(this, &old, &new, (integer(name, count.as_ref(), -1)?, bytes_max)).map(PyValue::text)
        }
        "center" | "ljust" | "rjust" | "zfill" | "expandtabs" => pad(this, name, given, bytes_max),
        "find" | "rfind" | "index" | "rindex" | "count" | "startswith" | "endswith" => {
            search(this, name, given)
        }
        "split" | "rsplit" | "splitlines" | "partition" | "rpartition" => split(this, name, given),
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = given.places(name)?;
            let chars = optional_text(name, chars.as_ref())?;
            let strips = |c: char| chars.as_ref().map_or_else(|| is_space(c), |chars| chars.contains(c));
            let begun = if name == "rstrip" { this } else { this.trim_start_matches(strips) };
            made(if name == "lstrip" { begun } else { begun.trim_end_matches(strips) }.to_owned())
        }
        "removeprefix" | "removesuffix" => {
            let [part] = given.places(name)?;
            let part = text(name, &part.unwrap_or(PyValue::None))?;
            let cut =
                if name == "removeprefix" { this.strip_prefix(&*part) } else { this.strip_suffix(&*part) };
            made(cut.unwrap_or(this).to_owned())
        }
        _ => {
            let [] = given.places(name)?;
            if name.starts_with("is") { Ok(PyValue::Bool(is(this, name))) } else { made(cased(this, name)) }
        }
    }
}

/// The text in another case.
pub fn cased(this: &str, name: &str) -> String {
    match name {
        "lower" | "casefold" if name == "lower" || !this.contains('ß') => this.to_lowercase(),
        "casefold" => this.replace('ß', "ss").to_lowercase(),
        "upper" => this.to_uppercase(),
        "capitalize" => {
            let mut chars = this.chars();
            chars.next().map_or_else(String::new, |first| titled(first) + &chars.as_str().to_lowercase())
        }
        "swapcase" => {
            let swap = |c: char| {
                if c.is_uppercase() {
                    c.to_lowercase().collect()
                } else {
                    c.to_uppercase().collect::<String>()
                }
            };
            this.chars().map(swap).collect()
        }
        _ => {
            let mut inside = false;
            let mut out = String::with_capacity(this.len());
            for c in this.chars() {
                match inside {
                    true => out.extend(c.to_lowercase()),
                    false => out.push_str(&titled(c)),
                }
                inside = c.is_lowercase() || c.is_uppercase();
            }
            out
        }
    }
}

/// A first letter: of those that become several, only the first is large.
fn titled(c: char) -> String {
    // Two letters in one have a form for titles.
    match c {
        'Ǆ'..='ǆ' => return "ǅ".into(),
        'Ǉ'..='ǉ' => return "ǈ".into(),
        'Ǌ'..='ǌ' => return "ǋ".into(),
        'Ǳ'..='ǳ' => return "ǲ".into(),
        _ => {}
    }
    let mut upper = c.to_uppercase();
    let first = upper.next().into_iter();
    first.chain(upper.flat_map(char::to_lowercase)).collect()
}

/// The questions about a text's characters.
pub fn is(this: &str, name: &str) -> bool {
    let all = |of: fn(char) -> bool| !this.is_empty() && this.chars().all(of);
    let cased = || this.chars().any(|c| c.is_lowercase() || c.is_uppercase());
    match name {
        "isalnum" => all(char::is_alphanumeric),
        "isalpha" => all(char::is_alphabetic),
        "isascii" => this.is_ascii(),
        "isdecimal" => all(is_decimal),
        "isdigit" => all(|c| is_decimal(c) || is_raised_or_ringed(c)),
        "isnumeric" => all(char::is_numeric),
        "isspace" => all(is_space),
        "isprintable" => this.chars().all(print::is_printable),
        "islower" => cased() && !this.chars().any(char::is_uppercase),
        "isupper" => cased() && !this.chars().any(char::is_lowercase),
        "isidentifier" => {
            all(|c| c == '_' || c.is_alphanumeric()) && !this.starts_with(|c: char| c.is_numeric())
        }
        // `istitle`: large letters begin words, small ones follow letters.
        _ => {
            let mut before = false;
            cased()
                && this.chars().all(|c| {
                    let right = if before { !c.is_uppercase() } else { !c.is_lowercase() };
                    before = c.is_lowercase() || c.is_uppercase();
                    right
                })
        }
    }
}

/// Digits that stand for tens: the numbers of the standard library without fractions, raised and ringed ones, and the
/// numbers of Rome, China and others that count otherwise.
fn is_decimal(c: char) -> bool {
    let other = matches!(c as u32, 0xB2..=0xBE | 0x09F4..=0x09F9 | 0x0B72..=0x0B77 | 0x0BF0..=0x0BF2 | 0x0C78..=0x0C7E
        | 0x0D58..=0x0D5E | 0x0D70..=0x0D78 | 0x0F2A..=0x0F33 | 0x1369..=0x137C | 0x16EE..=0x16F0 | 0x17F0..=0x17F9
        | 0x19DA | 0x2070..=0x2189 | 0x2460..=0x2793 | 0x2CFD | 0x3007..=0x32BF | 0xA6E6..=0xA6EF | 0xA830..=0xA835);
    c.is_numeric() && !other && !c.is_alphabetic()
}

/// `²`, `①` and the like, which are digits and no decimals.
fn is_raised_or_ringed(c: char) -> bool {
    matches!(c as u32, 0xB2 | 0xB3 | 0xB9 | 0x1369..=0x1371 | 0x19DA | 0x2070 | 0x2074..=0x2079 | 0x2080..=0x2089
        | 0x2460..=0x2468 | 0x2474..=0x247C | 0x2488..=0x2490 | 0x24EA | 0x24F5..=0x24FD | 0x24FF | 0x2776..=0x277E
        | 0x2780..=0x2788 | 0x278A..=0x2792)
}

/// Replaces the first `count` parts, all of them where it is negative.
pub fn replace(this: &str, old: &str, new: &str, (count, bytes_max): (i128, usize)) -> Outcome<String> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let found = if old.is_empty() { this.chars().count() + 1 } else { this.matches(old).count() }.min(count);
    if this.len() + found.saturating_mul(new.len()) > bytes_max.saturating_add(found * old.len()) {
        return raise(format!("a text of more than {bytes_max} bytes"));
    }
    Ok(this.replacen(old, new, count))
}

fn pad(this: &str, name: &str, given: &Given, bytes_max: usize) -> Outcome<PyValue> {
    let [width, fill] =
        given.bind(name, [if name == "expandtabs" { "tabsize" } else { "width" }, "fillchar"])?;
    let fill = optional_text(name, fill.as_ref())?;
    let fill = fill.as_deref().unwrap_or(if name == "zfill" { "0" } else { " " });
    if fill.chars().count() != 1 {
        return raise("The fill character must be exactly one character long");
    }
    let width = integer(name, width.as_ref(), 8)?.max(0);
    let width = usize::try_from(width).unwrap_or(usize::MAX);
    let tabs = if name == "expandtabs" { this.matches('\t').count() } else { 1 };
    if width.saturating_mul(fill.len()).saturating_mul(tabs) > bytes_max {
        return raise(format!("a text of more than {bytes_max} bytes"));
    }
    if name == "expandtabs" {
        return Ok(PyValue::text(expand_tabs(this, width)));
    }
    let missing = width.saturating_sub(this.chars().count());
    let left = match name {
        "ljust" => 0,
        // Python puts the odd one left where the width is odd.
        "center" => missing / 2 + (missing & width & 1),
        _ => missing,
    };
    let (left, right) = (fill.repeat(left), fill.repeat(missing - left));
    let made = match this.strip_prefix(['+', '-']) {
        Some(number) if name == "zfill" => format!("{}{left}{number}", &this[..1]),
        _ => format!("{left}{this}{right}"),
    };
    Ok(PyValue::text(made))
}

fn expand_tabs(this: &str, size: usize) -> String {
    let (mut out, mut column) = (String::new(), 0);
    for c in this.chars() {
        match c {
            '\t' if size > 0 => {
                let spaces = size - column % size;
                out.extend(std::iter::repeat_n(' ', spaces));
                column += spaces;
            }
            '\t' => {}
            c => {
                out.push(c);
                column = if matches!(c, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    out
}

/// The part between two places in characters, and where it begins in bytes.
fn part<'a>(
    this: &'a str,
    name: &str,
    start: Option<PyValue>,
    stop: Option<PyValue>,
) -> Outcome<Option<(&'a str, i128)>> {
    let given = |value: Option<PyValue>| value.filter(|value| !matches!(value, PyValue::None));
    let (start, stop) = (given(start), given(stop));
    if start.is_none() && stop.is_none() {
        return Ok(Some((this, 0)));
    }
    let length = this.chars().count() as i128;
    let place = |at: i128| (if at < 0 { at + length } else { at }).max(0);
    let start = place(integer(name, start.as_ref(), 0)?);
    let stop = place(integer(name, stop.as_ref(), length)?).min(length);
    if start > stop {
        return Ok(None);
    }
    let byte = |at: i128| this.char_indices().nth(at as usize).map_or(this.len(), |(byte, _)| byte);
    Ok(Some((&this[byte(start)..byte(stop)], start)))
}

fn search(this: &str, name: &str, given: &Given) -> Outcome<PyValue> {
    let [what, start, stop] = given.places(name)?;
    let what = what.unwrap_or(PyValue::None);
    let part = part(this, name, start, stop)?;
    if matches!(name, "startswith" | "endswith") {
        let options = match &what {
            PyValue::List(list) if list.tuple => list.items.clone(),
            other => vec![other.clone()],
        };
        for option in options {
            let option = text(name, &option)?;
            let fits = |(part, _): &(&str, i128)| match name {
                "startswith" => part.starts_with(&*option),
                _ => part.ends_with(&*option),
            };
            if part.as_ref().is_some_and(fits) {
                return Ok(PyValue::Bool(true));
            }
        }
        return Ok(PyValue::Bool(false));
    }
    let what = text(name, &what)?;
    if name == "count" {
        let count = part.map_or(0, |(part, _)| match &*what {
            "" => part.chars().count() + 1,
            what => part.matches(what).count(),
        });
        return Ok(PyValue::Int(count as i128));
    }
    let found = part.and_then(|(part, begins)| {
        let at = if name.starts_with('r') { part.rfind(&*what) } else { part.find(&*what) };
        at.map(|at| begins + part[..at].chars().count() as i128)
    });
    match found {
        Some(at) => Ok(PyValue::Int(at)),
        None if name.ends_with("index") => raise("substring not found"),
        None => Ok(PyValue::Int(-1)),
    }
}

fn split(this: &str, name: &str, given: &Given) -> Outcome<PyValue> {
    let texts = |parts: Vec<&str>| PyValue::list(parts.into_iter().map(PyValue::text).collect());
    if name == "splitlines" {
        let [keep] = given.bind(name, ["keepends"])?;
        return texts(lines(this, keep.is_some_and(|keep| keep.is_true())));
    }
    if name.ends_with("partition") {
        let [separator] = given.places(name)?;
        let separator = text(name, &separator.unwrap_or(PyValue::None))?;
        if separator.is_empty() {
            return raise("empty separator");
        }
        let right = name == "rpartition";
        let at = if right { this.rfind(&*separator) } else { this.find(&*separator) };
        let parts = match at {
            Some(at) => [&this[..at], &*separator, &this[at + separator.len()..]],
            None if right => ["", "", this],
            None => [this, "", ""],
        };
        return PyValue::tuple(parts.map(PyValue::text).into());
    }
    let [separator, most] = given.bind(name, ["sep", "maxsplit"])?;
    let separator = optional_text(name, separator.as_ref())?;
    let most = usize::try_from(integer(name, most.as_ref(), -1)?).unwrap_or(usize::MAX);
    let limit = most.saturating_add(1);
    match separator.as_deref() {
        Some("") => raise("empty separator"),
        Some(separator) if name == "split" => texts(this.splitn(limit, separator).collect()),
        Some(separator) => {
            let mut parts: Vec<&str> = this.rsplitn(limit, separator).collect();
            parts.reverse();
            texts(parts)
        }
        None => texts(words(this, most, name == "rsplit")),
    }
}

/// Splits at white space, at most so many times; what is left then keeps the white space on its other side.
fn words(this: &str, most: usize, from_right: bool) -> Vec<&str> {
    let mut rest = this;
    let mut found = Vec::new();
    loop {
        rest = if from_right { rest.trim_end_matches(is_space) } else { rest.trim_start_matches(is_space) };
        if rest.is_empty() {
            break;
        }
        let at = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
        match at.filter(|_| found.len() < most) {
            None => {
                found.push(rest);
                break;
            }
            Some(at) if from_right => {
                let width = rest[at..].chars().next().map_or(1, char::len_utf8);
                found.push(&rest[at + width..]);
                rest = &rest[..at];
            }
            Some(at) => {
                found.push(&rest[..at]);
                rest = &rest[at..];
            }
        }
    }
    if from_right {
        found.reverse();
    }
    found
}

/// `splitlines`.
pub fn lines(this: &str, keep_ends: bool) -> Vec<&str> {
    let is_end = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{B}' | '\u{C}' | '\u{1C}'..='\u{1E}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut found = Vec::new();
    let mut rest = this;
    while let Some(at) = rest.find(is_end) {
        let after = &rest[at..];
        let width =
            if after.starts_with("\r\n") { 2 } else { after.chars().next().map_or(1, char::len_utf8) };
        found.push(if keep_ends { &rest[..at + width] } else { &rest[..at] });
        rest = &rest[at + width..];
    }
    if !rest.is_empty() {
        found.push(rest);
    }
    found
}
