//! Lines of a batch's input, cut out of bytes as they come, and what OpenAI's API would say is wrong with them. Pure.

use std::collections::HashSet;

use bytes::{Bytes, BytesMut};
use millrace_crds::request::{CHAT_COMPLETIONS, COMPLETIONS};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::entries::CUSTOM_ID_BYTES_MAX;
use crate::http::batches::record::LineFault;

/// The paths that lines may name.
pub const ENDPOINTS: [&str; 2] = [CHAT_COMPLETIONS, COMPLETIONS];
/// Most faults that are told; reading ends with the last of them.
pub const FAULTS_MAX: usize = 100;
/// Beside its body a line may have this many bytes.
const AROUND_BODY_BYTES: usize = 4096;

/// Cuts bytes into lines.
#[derive(Debug)]
pub struct LineSplitter {
    buffer: BytesMut,
    /// Up to here there is no line break.
    searched: usize,
    number: u64,
    bytes_max: usize,
    /// The rest of a line that is too long is passed over.
    skipping: bool,
}

/// A line that is not blank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutLine {
    /// Its number, from 1; blank lines count.
    pub number: u64,
    /// Its text, without its end; `None` where it is too long.
    pub text: Option<Bytes>,
}

impl LineSplitter {
    /// For requests whose bodies have at most so many bytes.
    pub fn new(body_bytes_max: usize) -> Self {
        let bytes_max = body_bytes_max + AROUND_BODY_BYTES;
        Self { buffer: BytesMut::new(), searched: 0, number: 0, bytes_max, skipping: false }
    }

    /// Takes bytes.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next line; `None` until more bytes come. `last` says that none will.
    pub fn next(&mut self, last: bool) -> Option<CutLine> {
        loop {
            let end = memchr::memchr(b'\n', &self.buffer[self.searched..]).map(|at| at + self.searched);
            let line = match end {
                Some(end) => {
                    let mut line = self.buffer.split_to(end + 1);
                    line.truncate(end);
                    line
                }
                None if last && (self.skipping || !self.buffer.is_empty()) => self.buffer.split(),
                None if self.buffer.len() > self.bytes_max => {
                    self.buffer.clear();
                    (self.searched, self.skipping) = (0, true);
                    return None;
                }
                None => {
                    self.searched = self.buffer.len();
                    return None;
                }
            };
            (self.searched, self.number) = (0, self.number + 1);
            let number = self.number;
            if std::mem::take(&mut self.skipping) || line.len() > self.bytes_max {
                return Some(CutLine { number, text: None });
            }
            // A byte order mark may stand before any line.
            let text = line.strip_prefix("\u{feff}".as_bytes()).unwrap_or(&line);
            if !text.trim_ascii().is_empty() {
                return Some(CutLine { number, text: Some(Bytes::copy_from_slice(text)) });
            }
        }
    }
}

/// A line's request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineRequest {
    /// The client's id of it.
    pub custom_id: String,
    /// What it calls the model.
    pub model: String,
    /// Its body as it came.
    pub body: Bytes,
}

#[derive(Debug, Deserialize)]
struct RawLine<'a> {
    custom_id: Option<Value>,
    method: Option<Value>,
    url: Option<Value>,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
}

#[derive(Debug, Deserialize)]
struct RawBody<'a> {
    model: Option<Value>,
    stream: Option<Value>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
}

/// A fault without its line.
type Fault = (&'static str, String, Option<&'static str>);

fn missing(param: &'static str) -> Fault {
    ("missing_required_parameter", format!("{param}: missing"), Some(param))
}

fn shown(value: &Value) -> String {
    value.to_string().chars().take(80).collect()
}

fn is_object(text: &[u8]) -> bool {
    text.trim_ascii_start().first() == Some(&b'{')
}

/// Reads a line for this endpoint, whose body may have so many bytes.
///
/// # Errors
/// What is wrong with it.
fn read(endpoint: &str, body_bytes_max: usize, text: &[u8]) -> Result<LineRequest, Fault> {
    let no_json =
        |reason: String| ("invalid_json_line", format!("the line is no JSON object: {reason}"), None);
    if !is_object(text) {
        return Err(no_json("it does not begin with a brace".into()));
    }
    let line: RawLine<'_> = serde_json::from_slice(text).map_err(|error| no_json(error.to_string()))?;
    let custom_id = match line.custom_id {
        None | Some(Value::Null) => return Err(missing("custom_id")),
        Some(Value::String(id)) if (1..=CUSTOM_ID_BYTES_MAX).contains(&id.len()) => id,
        Some(other) => {
            let message =
                format!("custom_id: {} is no text of 1 to {CUSTOM_ID_BYTES_MAX} bytes", shown(&other));
            return Err(("invalid_custom_id", message, Some("custom_id")));
        }
    };
    match line.method {
        None | Some(Value::Null) => return Err(missing("method")),
        Some(Value::String(method)) if method == "POST" => {}
        Some(other) => {
            return Err(("invalid_method", format!("method: {} is not POST", shown(&other)), Some("method")));
        }
    }
    match line.url {
        None | Some(Value::Null) => return Err(missing("url")),
        Some(Value::String(url)) if url == endpoint => {}
        Some(other) => {
            let message = format!("url: {} is not the batch's endpoint {endpoint}", shown(&other));
            return Err(("invalid_url", message, Some("url")));
        }
    }
    let body = line.body.ok_or_else(|| missing("body"))?.get().as_bytes();
    let model = read_body(endpoint, body_bytes_max, body)?;
    Ok(LineRequest { custom_id, model, body: Bytes::copy_from_slice(body) })
}

/// The model that a body names.
fn read_body(endpoint: &str, body_bytes_max: usize, body: &[u8]) -> Result<String, Fault> {
    if body.len() > body_bytes_max {
        let message = format!("body: it has {} bytes; {body_bytes_max} are allowed", body.len());
        return Err(("request_too_large", message, Some("body")));
    }
    let wrong = |reason: String| ("invalid_request", format!("body: {reason}"), Some("body"));
    if !is_object(body) {
        return Err(wrong("it is no JSON object".into()));
    }
    let fields: RawBody<'_> = serde_json::from_slice(body).map_err(|error| wrong(error.to_string()))?;
    let (name, input) = match endpoint {
        CHAT_COMPLETIONS => ("body.messages", fields.messages),
        _ => ("body.prompt", fields.prompt),
    };
    if input.is_none() {
        return Err(missing(name));
    }
    if fields.stream == Some(Value::Bool(true)) {
        let message = "body.stream: a batch has no streams".to_owned();
        return Err(("invalid_request", message, Some("body.stream")));
    }
    match fields.model {
        Some(Value::String(model)) => Ok(model),
        None | Some(Value::Null) => Err(missing("body.model")),
        Some(other) => {
            let message = format!("body.model: {} is no model's name", shown(&other));
            Err(("invalid_request", message, Some("body.model")))
        }
    }
}

/// All lines of an input, one after another.
#[derive(Debug)]
pub struct LineChecker {
    endpoint: String,
    body_bytes_max: usize,
    lines_max: u64,
    seen: HashSet<[u8; 16]>,
    /// The model that the first line names.
    pub model: Option<String>,
    /// Good lines.
    pub lines: u64,
    /// What is wrong.
    pub faults: Vec<LineFault>,
}

impl LineChecker {
    /// For an endpoint, bodies and numbers of lines.
    pub fn new(endpoint: &str, body_bytes_max: usize, lines_max: u64) -> Self {
        Self {
            endpoint: endpoint.to_owned(),
            body_bytes_max,
            lines_max,
            seen: HashSet::new(),
            model: None,
            lines: 0,
            faults: Vec::new(),
        }
    }

    /// Reads a line of an input that was checked before.
    ///
    /// # Errors
    /// What is wrong with it after all.
    pub fn read(&self, line: &CutLine) -> Result<LineRequest, LineFault> {
        let too_long = || {
            let message = format!("the line is too long: bodies have at most {} bytes", self.body_bytes_max);
            ("request_too_large", message, Some("body"))
        };
        let text = line.text.as_ref().ok_or_else(too_long);
        let request = text.and_then(|text| read(&self.endpoint, self.body_bytes_max, text));
        request.map_err(|(code, message, param)| fault(code, Some(line.number), message, param))
    }

    /// Checks a line; `false` where no more lines need to be read.
    pub fn check(&mut self, line: &CutLine) -> bool {
        let checked = self.read(line).and_then(|request| self.fits(line.number, request));
        match checked {
            Ok(()) => self.lines += 1,
            Err(fault) => self.faults.push(fault),
        }
        if self.lines > self.lines_max {
            let message = format!("the input has more than {} lines", self.lines_max);
            self.faults.push(fault("too_many_requests", None, message, None));
            return false;
        }
        self.faults.len() < FAULTS_MAX
    }

    /// How it goes with the lines before it.
    fn fits(&mut self, number: u64, request: LineRequest) -> Result<(), LineFault> {
        let digest = Sha256::digest(&request.custom_id);
        let mut short = [0; 16];
        short.copy_from_slice(&digest[..16]);
        if !self.seen.insert(short) {
            let name: String = request.custom_id.chars().take(80).collect();
            let message = format!("custom_id: {name:?} stands on an earlier line already");
            return Err(fault("duplicate_custom_id", Some(number), message, Some("custom_id")));
        }
        match &self.model {
            None => self.model = Some(request.model),
            Some(model) if *model == request.model => {}
            Some(model) => {
                let (other, model): (String, String) =
                    (request.model.chars().take(80).collect(), model.chars().take(80).collect());
                let message = format!("body.model: {other:?} is not {model:?}: a batch is of one model");
                return Err(fault("mismatched_model", Some(number), message, Some("body.model")));
            }
        }
        Ok(())
    }

    /// What is wrong with the whole, once all lines were checked.
    pub fn end(&mut self) {
        if self.lines == 0 && self.faults.is_empty() {
            self.faults.push(fault("empty_file", None, "the input has no lines".into(), None));
        }
    }
}

/// A fault.
pub fn fault(code: &str, line: Option<u64>, message: String, param: Option<&str>) -> LineFault {
    LineFault { code: code.to_owned(), line, message, param: param.map(str::to_owned) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &[u8], step: usize, limit: usize) -> Vec<(u64, Option<String>)> {
        let mut splitter = LineSplitter::new(limit);
        let mut lines = Vec::new();
        let mut take = |line: CutLine| {
            lines.push((line.number, line.text.map(|text| String::from_utf8(text.to_vec()).unwrap())));
        };
        for piece in text.chunks(step) {
            splitter.feed(piece);
            while let Some(line) = splitter.next(false) {
                take(line);
            }
        }
        while let Some(line) = splitter.next(true) {
            take(line);
        }
        lines
    }

    #[test]
    fn lines_are_the_same_however_they_come() {
        let text = "\u{feff}one\r\n\n  \ntwo\nthree";
        let expected = vec![(1, Some("one\r".into())), (4, Some("two".into())), (5, Some("three".into()))];
        for step in 1..text.len() {
            assert_eq!(cut(text.as_bytes(), step, 10), expected, "{step} bytes at a time");
        }
        assert_eq!(cut(b"\n\n", 1, 10), vec![]);
    }

    #[test]
    fn a_line_that_is_too_long_is_passed_over_and_not_kept() {
        let long = "x".repeat(3 * AROUND_BODY_BYTES);
        let text = format!("a\n{long}\nb\n{long}");
        for step in [1, 100, 5000, text.len()] {
            let lines = cut(text.as_bytes(), step, 10);
            assert_eq!(lines, [(1, Some("a".into())), (2, None), (3, Some("b".into())), (4, None)], "{step}");
        }
    }

    fn line(custom_id: &str, body: &str) -> String {
        format!(r#"{{"custom_id":"{custom_id}","method":"POST","url":"/v1/chat/completions","body":{body}}}"#)
    }

    fn checked(lines: &[&str]) -> LineChecker {
        let mut checker = LineChecker::new(CHAT_COMPLETIONS, 200, 3);
        for (index, text) in lines.iter().enumerate() {
            let text = Some(Bytes::copy_from_slice(text.as_bytes()));
            checker.check(&CutLine { number: index as u64 + 1, text });
        }
        checker.end();
        checker
    }

    const BODY: &str = r#"{"model":"m","messages":[], "top_p":1.0}"#;

    #[test]
    fn good_lines_are_read_as_they_came() {
        let checker = checked(&[&line("a", BODY), &line("b", BODY)]);
        assert_eq!((checker.lines, checker.model.as_deref(), checker.faults.len()), (2, Some("m"), 0));
        let text = Some(line("a", BODY).into());
        let request = checker.read(&CutLine { number: 1, text }).unwrap();
        assert_eq!((request.custom_id.as_str(), &request.body[..]), ("a", BODY.as_bytes()));
    }

    #[test]
    fn each_fault_names_its_line_and_field() {
        let long = format!(r#"{{"model":"m","messages":["{}"]}}"#, "x".repeat(200));
        let cases = [
            ("{".to_owned(), "invalid_json_line", None),
            ("[1]".to_owned(), "invalid_json_line", None),
            (line("", BODY), "invalid_custom_id", Some("custom_id")),
            (line("a", BODY).replace("custom_id", "id"), "missing_required_parameter", Some("custom_id")),
            (line("a", BODY).replace("POST", "GET"), "invalid_method", Some("method")),
            (line("a", BODY).replace("/chat", ""), "invalid_url", Some("url")),
            (line("a", "[]"), "invalid_request", Some("body")),
            (line("a", "{\"model\":\"m\"}"), "missing_required_parameter", Some("body.messages")),
            (line("a", "{\"messages\":[]}"), "missing_required_parameter", Some("body.model")),
            (line("a", &BODY.replace("1.0", "1,\"stream\":true")), "invalid_request", Some("body.stream")),
            (line("a", &long), "request_too_large", Some("body")),
        ];
        for (text, code, param) in cases {
            let faults = checked(&[&line("z", BODY), &text]).faults;
            let [fault] = &faults[..] else { panic!("{text}: {faults:?}") };
            let found = (fault.code.as_str(), fault.line, fault.param.as_deref());
            assert_eq!(found, (code, Some(2), param), "{text}");
        }
    }

    #[test]
    fn lines_are_checked_against_each_other() {
        let code = |lines: &[&str]| checked(lines).faults.iter().map(|f| f.code.clone()).collect::<Vec<_>>();
        let (a, b) = (line("a", BODY), line("b", &BODY.replace("\"m\"", "\"n\"")));
        assert_eq!(code(&[&a, &a]), ["duplicate_custom_id"]);
        assert_eq!(code(&[&a, &b]), ["mismatched_model"]);
        assert_eq!(code(&[]), ["empty_file"]);
        let many: Vec<String> = (0..4).map(|number| line(&number.to_string(), BODY)).collect();
        assert_eq!(code(&many.iter().map(String::as_str).collect::<Vec<_>>()), ["too_many_requests"]);
    }
}
