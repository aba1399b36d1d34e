//! Source to tokens, with Jinja2's rules for white space: `trim_blocks`, `lstrip_blocks`, `-` and `+` at tags.

use super::text::is_space;
use super::{Outcome, Raised};

/// A token of a template.
#[derive(Debug, Clone, PartialEq)]
pub enum Lexeme {
    /// Text between tags.
    Data(String),
    BlockBegin,
    BlockEnd,
    PrintBegin,
    PrintEnd,
    Name(String),
    Text(String),
    Int(i128),
    Float(f64),
    Symbol(&'static str),
    End,
}

/// Longest first, so that `**` is not two `*`.
const SYMBOLS: [&str; 26] = [
    "**", "//", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<",
    "=", ".", ":", "|", ",", ";",
];

/// The tokens with their lines; the last one is [`Lexeme::End`].
pub fn tokens(source: &str) -> Outcome<Vec<(Lexeme, usize)>> {
    let mut source = source.replace("\r\n", "\n").replace('\r', "\n");
    if source.ends_with('\n') {
        source.pop();
    }
    let mut lexer = Lexer { rest: &source, line: 1, line_begins: true, tokens: Vec::new() };
    match lexer.template() {
        Ok(()) => {
            lexer.push(Lexeme::End);
            Ok(lexer.tokens)
        }
        Err(raised) => Err(raised.at(lexer.line)),
    }
}

struct Lexer<'a> {
    rest: &'a str,
    line: usize,
    /// Whether what was read last ended with a line feed.
    line_begins: bool,
    tokens: Vec<(Lexeme, usize)>,
}

fn fail<T>(message: impl Into<String>) -> Outcome<T> {
    Err(Raised { message: message.into(), line: None })
}

impl<'a> Lexer<'a> {
    fn push(&mut self, token: Lexeme) {
        self.tokens.push((token, self.line));
    }

    fn advance(&mut self, bytes: usize) -> &'a str {
        let (read, rest) = self.rest.split_at(bytes);
        self.line += read.matches('\n').count();
        self.line_begins = read.ends_with('\n');
        self.rest = rest;
        read
    }

    fn template(&mut self) -> Outcome<()> {
        loop {
            let Some(at) = ["{%", "{{", "{#"].iter().filter_map(|tag| self.rest.find(tag)).min() else {
                self.data(self.rest.len(), None);
                return Ok(());
            };
            let tag = &self.rest[at..at + 2];
            let sign = self.rest[at + 2..].chars().next().filter(|sign| matches!(sign, '-' | '+'));
            let raw = if tag == "{%" { raw_tag(&self.rest[at + 2..]) } else { None };
            self.data(at, Some((sign, tag != "{{")));
            self.advance(2 + sign.map_or(0, char::len_utf8));
            match (tag, raw) {
                ("{%", Some(length)) => {
                    self.advance(length - sign.map_or(0, char::len_utf8));
                    self.raw()?;
                }
                ("{%", None) => {
                    self.push(Lexeme::BlockBegin);
                    self.tag("%}")?;
                }
                ("{#", _) => self.comment()?,
                _ => {
                    self.push(Lexeme::PrintBegin);
                    self.tag("}}")?;
                }
            }
        }
    }

    /// Text up to the next tag, which may strip its end: `-` all white space, a block's tag the white space that
    /// stands before it in its line.
    fn data(&mut self, bytes: usize, tag: Option<(Option<char>, bool)>) {
        let (line, began) = (self.line, self.line_begins);
        let text = self.advance(bytes);
        if bytes == 0 {
            self.line_begins = began;
        }
        let kept = match tag {
            Some((Some('-'), _)) => text.trim_end_matches(is_space),
            Some((None, true)) => {
                let begin = text.rfind('\n').map_or(0, |at| at + 1);
                let blank = !text[begin..].is_empty() && text[begin..].chars().all(is_space);
                if (begin > 0 || began) && blank { &text[..begin] } else { text }
            }
            _ => text,
        };
        if !kept.is_empty() {
            self.tokens.push((Lexeme::Data(kept.to_owned()), line));
        }
    }

    /// Reads the end of a block or comment that stands here, and what it trims.
    fn end(&mut self, close: &str) -> bool {
        let trims = close != "}}";
        for (sign, strips) in [("-", true), ("+", false), ("", false)] {
            let Some(after) = self.rest.strip_prefix(sign).and_then(|rest| rest.strip_prefix(close)) else {
                continue;
            };
            if sign == "+" && !trims {
                continue;
            }
            let extra = match (strips, sign) {
                (true, _) => after.len() - after.trim_start_matches(is_space).len(),
                (false, "") if trims => usize::from(after.starts_with('\n')),
                _ => 0,
            };
            self.advance(sign.len() + close.len() + extra);
            return true;
        }
        false
    }

    fn comment(&mut self) -> Outcome<()> {
        let Some(at) = self.rest.find("#}") else { return fail("Missing end of comment tag") };
        let signed = self.rest[..at].ends_with(['-', '+']);
        self.advance(at - usize::from(signed));
        self.end("#}");
        Ok(())
    }

    /// From behind `{% raw %}` to behind `{% endraw %}`.
    fn raw(&mut self) -> Outcome<()> {
        let mut from = 0;
        while let Some(at) = self.rest[from..].find("{%").map(|at| at + from) {
            let inner = &self.rest[at + 2..];
            let sign = inner.chars().next().filter(|sign| matches!(sign, '-' | '+'));
            let name = inner[sign.map_or(0, char::len_utf8)..].trim_start_matches(is_space);
            let after = name.strip_prefix("endraw").map(|rest| rest.trim_start_matches(is_space));
            if let Some(after) =
                after.filter(|after| ["%}", "-%}", "+%}"].iter().any(|end| after.starts_with(end)))
            {
                let head = self.rest.len() - at - after.len();
                self.data(at, Some((sign, true)));
                self.advance(head);
                self.end("%}");
                return Ok(());
            }
            from = at + 2;
        }
        fail("Missing end of raw directive")
    }

    /// The tokens of one tag. Its end is looked for only outside of brackets.
    fn tag(&mut self, close: &'static str) -> Outcome<()> {
        let mut open: Vec<&str> = Vec::new();
        loop {
            self.advance(self.rest.len() - self.rest.trim_start_matches(is_space).len());
            if open.is_empty() && self.end(close) {
                self.push(if close == "%}" { Lexeme::BlockEnd } else { Lexeme::PrintEnd });
                return Ok(());
            }
            let Some(c) = self.rest.chars().next() else { return fail("unexpected end of template") };
            if c.is_ascii_digit() {
                self.number()?;
            } else if c == '_' || c.is_alphanumeric() {
                let end = self.rest.find(|c: char| c != '_' && !c.is_alphanumeric());
                let line = self.line;
                let name = self.advance(end.unwrap_or(self.rest.len())).to_owned();
                self.tokens.push((Lexeme::Name(name), line));
            } else if matches!(c, '"' | '\'') {
                self.text(c)?;
            } else {
                let Some(symbol) = SYMBOLS.into_iter().find(|symbol| self.rest.starts_with(symbol)) else {
                    return fail(format!("unexpected char {c:?}"));
                };
                balance(symbol, &mut open)?;
                self.push(Lexeme::Symbol(symbol));
                self.advance(symbol.len());
            }
        }
    }

    fn text(&mut self, quote: char) -> Outcome<()> {
        let mut escaped = false;
        let end = self.rest[1..].find(|c| {
            let closes = c == quote && !escaped;
            escaped = c == '\\' && !escaped;
            closes
        });
        let Some(end) = end else { return fail("unexpected char: the string has no end") };
        let line = self.line;
        let whole = self.advance(end + 2);
        let text = unescape(&whole[1..=end])?;
        self.tokens.push((Lexeme::Text(text), line));
        Ok(())
    }

    fn number(&mut self) -> Outcome<()> {
        let radix = match self.rest.get(..2).map(str::to_ascii_lowercase).as_deref() {
            Some("0x") => 16,
            Some("0o") => 8,
            Some("0b") => 2,
            _ => 10,
        };
        if radix != 10 {
            let digits = self.digits(2, radix);
            let text = self.advance(digits)[2..].replace('_', "");
            let Ok(value) = i128::from_str_radix(&text, radix) else {
                return fail("the number is no integer");
            };
            self.push(Lexeme::Int(value));
            return Ok(());
        }
        let whole = self.digits(0, 10);
        let mut end = whole;
        if self.rest[end..].starts_with('.') && self.digits(end + 1, 10) > end + 1 {
            end = self.digits(end + 1, 10);
        }
        if self.rest[end..].starts_with(['e', 'E']) {
            let sign = usize::from(self.rest[end + 1..].starts_with(['-', '+']));
            let digits = self.digits(end + 1 + sign, 10);
            end = if digits > end + 1 + sign { digits } else { end };
        }
        let text = self.advance(end).replace('_', "");
        let token = if end == whole {
            text.parse().ok().map(Lexeme::Int)
        } else {
            text.parse().ok().map(Lexeme::Float)
        };
        let Some(token) = token else { return fail("the number is too large") };
        self.push(token);
        Ok(())
    }

    /// Where the digits that begin at `from` end. A `_` may stand between two digits.
    fn digits(&self, from: usize, radix: u32) -> usize {
        let bytes = self.rest.as_bytes();
        let digit = |at: usize| bytes.get(at).is_some_and(|&byte| char::from(byte).is_digit(radix));
        let mut end = from;
        while digit(end) || (bytes.get(end) == Some(&b'_') && digit(end + 1)) {
            end += 1;
        }
        end
    }
}

/// The length of `raw` and the rest of its tag, behind `{%`.
fn raw_tag(inner: &str) -> Option<usize> {
    let name = inner.trim_start_matches(['-', '+']).trim_start_matches(is_space).strip_prefix("raw")?;
    let rest = name.trim_start_matches(is_space);
    if let Some(after) = rest.strip_prefix("-%}") {
        return Some(inner.len() - after.trim_start_matches(is_space).len());
    }
    rest.strip_prefix("%}").map(|after| inner.len() - after.len())
}

fn balance<'a>(symbol: &'a str, open: &mut Vec<&'a str>) -> Outcome<()> {
    match symbol {
        "(" => open.push(")"),
        "[" => open.push("]"),
        "{" => open.push("}"),
        ")" | "]" | "}" => match open.pop() {
            Some(expected) if expected == symbol => {}
            Some(expected) => return fail(format!("unexpected '{symbol}', expected '{expected}'")),
            None => return fail(format!("unexpected '{symbol}'")),
        },
        _ => {}
    }
    Ok(())
}

/// Python's escapes in a string; an unknown one stays as it is.
fn unescape(text: &str) -> Outcome<String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let Some(c) = rest[at + 1..].chars().next() else { return fail("\\ at end of string") };
        rest = &rest[at + 1 + c.len_utf8()..];
        let plain = match c {
            '\n' => continue,
            '\\' | '\'' | '"' => c,
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'a' => '\u{7}',
            'b' => '\u{8}',
            'f' => '\u{C}',
            'v' => '\u{B}',
            'x' | 'u' | 'U' => {
                let digits = match c {
                    'x' => 2,
                    'u' => 4,
                    _ => 8,
                };
                let code = rest.get(..digits).and_then(|hex| u32::from_str_radix(hex, 16).ok());
                let Some(code) = code.and_then(char::from_u32) else {
                    return fail(format!("\\{c}: {digits} hexadecimal digits of a character must follow"));
                };
                rest = &rest[digits..];
                code
            }
            '0'..='7' => {
                let more = rest.chars().take(2).take_while(|c| c.is_digit(8)).count();
                let octal = u32::from_str_radix(&format!("{c}{}", &rest[..more]), 8);
                rest = &rest[more..];
                octal.ok().and_then(char::from_u32).unwrap_or_default()
            }
            'N' => return fail("\\N{...}: characters by name are not supported; write \\u and the code"),
            other => {
                out.push('\\');
                other
            }
        };
        out.push(plain);
    }
    out.push_str(rest);
    Ok(out)
}
