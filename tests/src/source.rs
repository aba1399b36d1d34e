//! Rust source text as the tidiness rules see it: code without comments and literals, functions with their
//! lengths and arguments, and which lines are test code.
//!
//! It is a lexer, not a parser: it relies on code that rustc accepts and rustfmt has laid out. It keeps the
//! line structure, so that every finding has the right line number.

/// A function's place and size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// The line of its `fn`, from 1.
    pub line: usize,
    /// Lines from `fn` to the closing brace; 0 without a body.
    pub lines: usize,
    /// Arguments besides `self`.
    pub arguments: usize,
}

/// The text with comments and the contents of literals replaced by spaces; newlines stay.
pub fn code(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match literal_or_comment(bytes, at) {
            Some(end) => end.min(bytes.len()),
            None => {
                at += 1;
                continue;
            }
        };
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    String::from_utf8(out).unwrap_or_default()
}

/// The end of the comment or literal that begins at `at`, if one does.
fn literal_or_comment(bytes: &[u8], at: usize) -> Option<usize> {
    let rest = &bytes[at..];
    let before = at.checked_sub(1).map_or(b' ', |i| bytes[i]);
    let in_word = before.is_ascii_alphanumeric() || before == b'_';
    match rest[0] {
        b'/' if rest.starts_with(b"//") => {
            Some(at + rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len()))
        }
        b'/' if rest.starts_with(b"/*") => Some(at + block_comment(rest)),
        b'"' => Some(at + quoted(rest)),
        b'b' if !in_word && rest.starts_with(b"b\"") => Some(at + 1 + quoted(&rest[1..])),
        b'b' | b'c' | b'r' if !in_word => raw_string(rest).map(|length| at + length),
        b'\'' => character(rest).map(|length| at + length),
        _ => None,
    }
}

fn block_comment(rest: &[u8]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        match &rest[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// Length of the literal that begins with `"`.
fn quoted(rest: &[u8]) -> usize {
    let mut at = 1;
    while at < rest.len() && rest[at] != b'"' {
        at += if rest[at] == b'\\' { 2 } else { 1 };
    }
    at + 1
}

/// Length of a raw string (`r"`, `r#"`, `br#"`), if one begins here.
fn raw_string(rest: &[u8]) -> Option<usize> {
    let prefix = rest.iter().take_while(|b| matches!(b, b'b' | b'c' | b'r')).count();
    if !rest[..prefix].contains(&b'r') {
        return None;
    }
    let hashes = rest[prefix..].iter().take_while(|&&b| b == b'#').count();
    if rest.get(prefix + hashes) != Some(&b'"') {
        return None;
    }
    let end: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
    let body = prefix + hashes + 1;
    let found = rest[body..].windows(end.len()).position(|window| window == end);
    Some(found.map_or(rest.len(), |position| body + position + end.len()))
}

/// Length of a character literal; `None` for a lifetime.
fn character(rest: &[u8]) -> Option<usize> {
    if rest.get(1) == Some(&b'\\') {
        return rest[2..].iter().skip(1).position(|&b| b == b'\'').map(|position| position + 4);
    }
    let text = std::str::from_utf8(&rest[1..rest.len().min(6)])
        .unwrap_or_else(|error| std::str::from_utf8(&rest[1..1 + error.valid_up_to()]).unwrap_or_default());
    let width = text.chars().next()?.len_utf8();
    (rest.get(1 + width) == Some(&b'\'')).then_some(width + 2)
}

/// The functions in `code`, which has passed through [`code`].
pub fn functions(code: &str) -> Vec<Function> {
    let bytes = code.as_bytes();
    let mut found = Vec::new();
    for (at, _) in code.match_indices("fn ") {
        let starts_word = at == 0 || !(bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
        let name: String = code[at + 3..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if !starts_word || name.is_empty() {
            continue;
        }
        let Some((inside, end)) = argument_list(code, at + 3 + name.len()) else { continue };
        let line = 1 + code[..at].matches('\n').count();
        let lines = body_end(code, end).map_or(0, |close| 1 + code[at..close].matches('\n').count());
        found.push(Function { name, line, lines, arguments: count_arguments(inside) });
    }
    found
}

/// What stands between the parentheses of the argument list, and where they end. Generics come before it.
fn argument_list(code: &str, from: usize) -> Option<(&str, usize)> {
    let bytes = code.as_bytes();
    let mut at = from;
    if bytes.get(at) == Some(&b'<') {
        at = closing(bytes, at)? + 1;
    }
    if bytes.get(at) != Some(&b'(') {
        return None;
    }
    let end = closing(bytes, at)?;
    Some((&code[at + 1..end], end + 1))
}

/// The bracket that closes the one at `open`. The arrow's `>` closes nothing.
fn closing(bytes: &[u8], open: usize) -> Option<usize> {
    let mut depth = 0usize;
    for at in open..bytes.len() {
        match bytes[at] {
            b'(' | b'[' | b'{' | b'<' => depth += 1,
            b'>' if matches!(bytes[at - 1], b'-' | b'=') => {}
            b')' | b']' | b'}' | b'>' => depth -= 1,
            _ => continue,
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

fn count_arguments(inside: &str) -> usize {
    let bytes = inside.as_bytes();
    let mut parts = Vec::new();
    let (mut start, mut depth) = (0, 0i32);
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            b'(' | b'[' | b'{' | b'<' => depth += 1,
            b'>' if at > 0 && matches!(bytes[at - 1], b'-' | b'=') => {}
            b')' | b']' | b'}' | b'>' => depth -= 1,
            b',' if depth == 0 => {
                parts.push(&inside[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&inside[start..]);
    let is_self = |part: &str| {
        let word = part.split(':').next().unwrap_or(part);
        word.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == "self")
    };
    parts.iter().map(|part| part.trim()).filter(|part| !part.is_empty() && !is_self(part)).count()
}

/// The brace that closes the body after a signature; `None` for a declaration.
fn body_end(code: &str, from: usize) -> Option<usize> {
    let bytes = code.as_bytes();
    let open = (from..bytes.len()).find(|&at| matches!(bytes[at], b'{' | b';'))?;
    if bytes[open] == b';' {
        // `-> [u8; 4] {` has a semicolon too; such a one stands inside brackets.
        let before = &code[from..open];
        if before.matches('[').count() == before.matches(']').count() {
            return None;
        }
        return body_end(code, open + 1);
    }
    let mut depth = 0usize;
    for (at, byte) in bytes.iter().enumerate().skip(open) {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => continue,
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

/// For each line of `code`, whether it belongs to a `#[cfg(test)]` module at the top level.
pub fn test_lines(code: &str) -> Vec<bool> {
    let mut marks = Vec::new();
    let mut inside = false;
    for line in code.lines() {
        inside |= line.starts_with("#[cfg(test)]") || line.starts_with("#[cfg(all(test");
        marks.push(inside);
        // rustfmt puts the end of a top-level item into the first column.
        if inside && (line.starts_with('}') || (line.starts_with("mod ") && line.trim_end().ends_with(';'))) {
            inside = false;
        }
    }
    marks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked() {
        let text = r##"let a = "x // {"; // fn gone(
let b = 'y'; let c: &'static str = r#"unsafe { "quoted" }"#; /* /* } */ { */
let d = '\''; let e = b"\"}"; let f = '{'; let g = for_r; let h = '\u{7d}';"##;
        let blanked = code(text);
        assert_eq!(blanked.lines().count(), 3);
        assert_eq!(blanked.len(), text.len());
        for gone in ["gone", "unsafe", "quoted", "{", "}", "\""] {
            assert!(!blanked.contains(gone), "{gone} in {blanked}");
        }
        for kept in ["let a", "&'static str", "let d", "let g = for_r;", "let h"] {
            assert!(blanked.contains(kept), "{kept} not in {blanked}");
        }
    }

    #[test]
    fn functions_have_lengths_and_arguments() {
        let text = "\
fn one<F: Fn(u8, u8) -> u8>(a: F, b: Vec<(u8, u8)>) -> [u8; 2] {
    {}
}
impl X {
    pub fn two(&mut self, a: u8,) {}
    fn three(self: Box<Self>, f: fn(u8, u8) -> u8);
}
";
        let found = functions(&code(text));
        let short: Vec<_> = found.iter().map(|f| (f.name.as_str(), f.line, f.lines, f.arguments)).collect();
        assert_eq!(short, [("one", 1, 3, 2), ("two", 5, 1, 1), ("three", 6, 0, 1)]);
    }

    #[test]
    fn test_modules_are_marked() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\nfn c() {}\n\
                    #[cfg(test)]\nmod tests;\nfn d() {}\n";
        assert_eq!(test_lines(text), [false, true, true, true, true, false, true, true, false]);
    }
}
