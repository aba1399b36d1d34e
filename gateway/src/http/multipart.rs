//! `multipart/form-data` as it comes (RFC 7578, RFC 2046): pieces in, events out, without a part ever being held
//! whole.
//!
//! What is held is at most what was fed and not taken yet, plus one delimiter; heads of parts and what stands before
//! the first one have a bound.

use bytes::{Buf, Bytes, BytesMut};
use memchr::memmem::Finder;

/// Longest head of a part, and longest text before the first part, in bytes.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Longest boundary that the standard allows, in bytes.
const BOUNDARY_BYTES_MAX: usize = 70;

/// What stands in a form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FormEvent {
    /// A part begins.
    Begin {
        /// The field's name.
        name: String,
        /// The file's name, if it is one.
        filename: Option<String>,
    },
    /// Bytes of the part.
    Data(Bytes),
    /// The part ends.
    End,
    /// The form ends.
    Finished,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Preamble,
    AfterDelimiter,
    Head,
    Body,
    Over,
}

/// A form that comes piece by piece.
#[derive(Debug)]
pub struct MultipartForm {
    delimiter: Finder<'static>,
    buffer: BytesMut,
    state: State,
}

impl MultipartForm {
    /// Of the content type of a request.
    ///
    /// # Errors
    /// When it is no form with a boundary.
    pub fn new(content_type: &str) -> Result<Self, String> {
        let mut parts = content_type.split(';').map(str::trim);
        let kind = parts.next().unwrap_or_default();
        if !kind.eq_ignore_ascii_case("multipart/form-data") {
            return Err(format!("the content type is {kind:?}; it must be multipart/form-data"));
        }
        let boundary = parts.find_map(|part| {
            let (name, value) = part.split_once('=')?;
            name.eq_ignore_ascii_case("boundary").then(|| value.trim_matches('"').to_owned())
        });
        let boundary = boundary.filter(|text| (1..=BOUNDARY_BYTES_MAX).contains(&text.len()));
        let boundary =
            boundary.ok_or(format!("the content type has no boundary of 1 to {BOUNDARY_BYTES_MAX} bytes"))?;
        let delimiter = format!("\r\n--{boundary}").into_bytes();
        // The first delimiter has no line before it.
        let buffer = BytesMut::from(&b"\r\n"[..]);
        Ok(Self { delimiter: Finder::new(&delimiter).into_owned(), buffer, state: State::Preamble })
    }

    /// Takes bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next event; `None` until more bytes come.
    ///
    /// # Errors
    /// What is wrong with the form.
    pub fn event(&mut self) -> Result<Option<FormEvent>, String> {
        loop {
            match self.state {
                State::Preamble => {
                    let Some(at) = self.delimiter.find(&self.buffer) else {
                        let long = self.buffer.len() > HEAD_BYTES_MAX;
                        return if long {
                            Err("the form does not begin with its boundary".into())
                        } else {
                            Ok(None)
                        };
                    };
                    self.buffer.advance(at + self.delimiter.needle().len());
                    self.state = State::AfterDelimiter;
                }
                State::AfterDelimiter => match self.buffer.get(..2) {
                    None => return Ok(None),
                    Some(b"--") => {
                        self.state = State::Over;
                        return Ok(Some(FormEvent::Finished));
                    }
                    // The line break stays: it is the end of an empty head.
                    Some(b"\r\n") => self.state = State::Head,
                    Some(_) => return Err("a boundary ends with neither a line break nor `--`".into()),
                },
                State::Head => {
                    let Some(end) = memchr::memmem::find(&self.buffer, b"\r\n\r\n") else {
                        let long = self.buffer.len() > HEAD_BYTES_MAX;
                        let told = format!("the head of a part has more than {HEAD_BYTES_MAX} bytes");
                        return if long { Err(told) } else { Ok(None) };
                    };
                    let head = self.buffer.split_to(end + 2);
                    // The body's delimiter may follow at once, and begins with a line break.
                    self.buffer.advance(2);
                    self.state = State::Body;
                    return read_head(&head).map(Some);
                }
                State::Body => return Ok(self.body()),
                State::Over => {
                    self.buffer.clear();
                    return Ok(None);
                }
            }
        }
    }

    fn body(&mut self) -> Option<FormEvent> {
        let length = self.delimiter.needle().len();
        match self.delimiter.find(&self.buffer) {
            Some(0) => {
                self.buffer.advance(length);
                self.state = State::AfterDelimiter;
                Some(FormEvent::End)
            }
            Some(at) => Some(FormEvent::Data(self.buffer.split_to(at).freeze())),
            // The end of what is there may be the beginning of a delimiter.
            None => {
                let sure = self.buffer.len().saturating_sub(length - 1);
                (sure > 0).then(|| FormEvent::Data(self.buffer.split_to(sure).freeze()))
            }
        }
    }
}

fn read_head(head: &[u8]) -> Result<FormEvent, String> {
    let head = std::str::from_utf8(head).map_err(|_| "the head of a part is not UTF-8".to_owned())?;
    let disposition = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-disposition").then_some(value)
    });
    let disposition = disposition.ok_or("a part has no Content-Disposition")?;
    let name = parameter(disposition, "name").ok_or("a part has no name")?;
    Ok(FormEvent::Begin { name, filename: parameter(disposition, "filename") })
}

/// The value of `; name="value"`; browsers and clients write a quote as `%22`, some as `\"`.
fn parameter(disposition: &str, name: &str) -> Option<String> {
    let mut rest = disposition;
    while let Some(at) = rest.find(';') {
        rest = rest[at + 1..].trim_start();
        let (key, value) = rest.split_once('=')?;
        let (text, after) = match value.strip_prefix('"') {
            None => {
                let end = value.find(';').unwrap_or(value.len());
                (value[..end].trim().to_owned(), &value[end..])
            }
            Some(quoted) => {
                let (mut text, mut escaped, mut end) = (String::new(), false, quoted.len());
                for (at, c) in quoted.char_indices() {
                    match c {
                        '"' if !escaped => {
                            end = at;
                            break;
                        }
                        '\\' if !escaped => escaped = true,
                        c => {
                            text.push(c);
                            escaped = false;
                        }
                    }
                }
                (text, quoted.get(end + 1..).unwrap_or_default())
            }
        };
        if key.trim().eq_ignore_ascii_case(name) {
            return Some(text.replace("%22", "\""));
        }
        rest = after;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORM: &str = "--xY\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a%22é.jsonl\"\r\n\
                        Content-Type: application/octet-stream\r\n\r\none\r\n--x\r\n\r\n--xYtwo\r\n--xY\r\n\
                        content-disposition: form-data; name=purpose\r\n\r\n\r\n--xY--\r\nafter";

    fn events(form: &str, step: usize) -> Result<Vec<FormEvent>, String> {
        let mut parser = MultipartForm::new("multipart/form-data; boundary=\"xY\"").unwrap();
        let mut events: Vec<FormEvent> = Vec::new();
        for piece in form.as_bytes().chunks(step) {
            parser.feed(piece);
            while let Some(event) = parser.event()? {
                match (events.last_mut(), event) {
                    (Some(FormEvent::Data(before)), FormEvent::Data(more)) => {
                        *before = [&before[..], &more[..]].concat().into();
                    }
                    (_, event) => events.push(event),
                }
            }
        }
        Ok(events)
    }

    #[test]
    fn a_form_is_the_same_however_it_comes() {
        let form = FORM.replace("--xYtwo", "-xYtwo");
        let begin = |name: &str, filename: Option<&str>| FormEvent::Begin {
            name: name.into(),
            filename: filename.map(str::to_owned),
        };
        let expected = vec![
            begin("file", Some("a\"é.jsonl")),
            FormEvent::Data("one\r\n--x\r\n\r\n-xYtwo".into()),
            FormEvent::End,
            begin("purpose", None),
            FormEvent::End,
            FormEvent::Finished,
        ];
        for step in 1..form.len() {
            assert_eq!(events(&form, step).unwrap(), expected, "{step} bytes at a time");
        }
        // A boundary within the content ends the part, and what follows must be one.
        assert!(events(FORM, 7).is_err());
    }

    #[test]
    fn what_is_no_form_is_refused_before_it_fills_the_memory() {
        for wrong in ["application/json", "multipart/form-data", "multipart/form-data; boundary="] {
            assert!(MultipartForm::new(wrong).is_err(), "{wrong}");
        }
        assert!(events(&"x".repeat(2 * HEAD_BYTES_MAX), 100).is_err());
        assert!(events(&format!("--xY\r\n{}", "x".repeat(2 * HEAD_BYTES_MAX)), 100).is_err());
        assert!(events("--xY\r\nContent-Type: text/plain\r\n\r\nx\r\n--xY--", 9).is_err(), "no name");
        // Content is handed on, not kept.
        let mut parser = MultipartForm::new("multipart/form-data; boundary=xY").unwrap();
        parser.feed(b"--xY\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\n");
        while parser.event().unwrap().is_some() {}
        for _ in 0..100 {
            parser.feed(&[b'x'; 1000]);
            while parser.event().unwrap().is_some() {}
            assert!(parser.buffer.len() < 100);
        }
    }
}
