//! What a request may come to, before it is run, and what it came to.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::http::limits::window::Amounts;

/// Bytes of a body that make a token, as a rule of thumb.
const BYTES_PER_TOKEN: u64 = 4;
/// Tokens of an answer whose request names no limit.
const OUTPUT_TOKENS: u64 = 256;

/// What of a body says how long the answer may be.
#[derive(Debug, Default, Deserialize)]
struct Lengths {
    max_tokens: Option<Value>,
    max_completion_tokens: Option<Value>,
    max_output_tokens: Option<Value>,
    n: Option<Value>,
}

/// One request, and the tokens that it may take: of its prompt by its length, of its answer what it allows.
pub fn estimate(body: &[u8]) -> Amounts {
    // What cannot be read is refused by the worker, and costs nothing in the end.
    let lengths: Lengths = serde_json::from_slice(body).unwrap_or_default();
    let number = |value: &Option<Value>| value.as_ref().and_then(Value::as_u64);
    let limits = [&lengths.max_tokens, &lengths.max_completion_tokens, &lengths.max_output_tokens];
    let output = limits.into_iter().find_map(number).unwrap_or(OUTPUT_TOKENS);
    let n = number(&lengths.n).unwrap_or(1).max(1);
    [1, body.len() as u64 / BYTES_PER_TOKEN + 1, output.saturating_mul(n)]
}

#[derive(Debug, Deserialize)]
struct Answer<'a> {
    #[serde(borrow)]
    response: Option<Response<'a>>,
}

#[derive(Debug, Deserialize)]
struct Response<'a> {
    #[serde(borrow)]
    body: &'a RawValue,
}

#[derive(Debug, Deserialize)]
struct Counted {
    usage: Option<Usage>,
}

#[derive(Debug, Default, Deserialize)]
struct Usage {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
}

/// What the outcome of a request says that it took; nothing for one that was refused.
pub fn usage(outcome: &Bytes) -> Amounts {
    let read = || {
        let line: Answer<'_> = serde_json::from_slice(outcome).ok()?;
        let body: Counted = serde_json::from_str(line.response?.body.get()).ok()?;
        body.usage
    };
    let usage = read().unwrap_or_default();
    [1, usage.prompt_tokens, usage.completion_tokens]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn before_and_after() {
        let body = br#"{"model":"m","prompt":"aaaa","max_tokens":10,"n":3}"#;
        assert_eq!(estimate(body), [1, body.len() as u64 / 4 + 1, 30]);
        assert_eq!(estimate(br#"{"max_completion_tokens":7,"max_tokens":null}"#)[2], 7);
        assert_eq!(estimate(b"{}")[2], OUTPUT_TOKENS);
        assert_eq!(estimate(br#"{"max_tokens":-1,"n":0}"#)[2], OUTPUT_TOKENS);
        assert_eq!(estimate(br#"{"max_tokens":18446744073709551615,"n":9}"#)[2], u64::MAX);
        let outcome = br#"{"id":"j","custom_id":"j","response":{"status_code":200,"request_id":"j","body":
            {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":9,"total_tokens":14}}},"error":null}"#;
        assert_eq!(usage(&Bytes::from_static(outcome)), [1, 5, 9]);
        let refused = br#"{"response":null,"error":{"code":"INVALID_REQUEST","message":"no"}}"#;
        assert_eq!(usage(&Bytes::from_static(refused)), [1, 0, 0]);
    }
}
