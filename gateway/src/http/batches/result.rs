//! A line of a batch's files, made of a job's stored outcome: OpenAI's form, the answer byte for byte as it was stored.

use millrace_crds::names::JobId;
use millrace_crds::request::Usage;
use millrace_crds::result::{ErrorCode, LineError};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use crate::http::batches::record::{BatchStatus, TokenCounts};
use crate::http::error::ApiError;

/// A finished line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineResult {
    /// Whether it has an answer.
    pub answered: bool,
    /// Whether it was given up because the batch's time was over.
    pub late: bool,
    /// Its tokens.
    pub tokens: TokenCounts,
    /// The line, with its end.
    pub text: String,
}

#[derive(Debug, Deserialize)]
struct RawOutcome<'a> {
    #[serde(borrow)]
    response: Option<RawResponse<'a>>,
    error: Option<LineError>,
}

#[derive(Debug, Deserialize)]
struct RawResponse<'a> {
    status_code: u16,
    #[serde(borrow)]
    body: &'a RawValue,
}

#[derive(Debug, Deserialize)]
struct Spent {
    usage: Option<Usage>,
}

/// The id of a line's job: the same whoever publishes it, and however often.
pub fn job_id(batch: &str, number: u64) -> JobId {
    let digits = batch.trim_start_matches(super::record::PREFIX);
    format!("batch-{digits}-{number}").parse().expect("hex and a number make an id")
}

fn quoted(text: &str) -> String {
    serde_json::to_string(text).expect("text is JSON")
}

impl LineResult {
    /// Of a stored outcome.
    pub fn of_outcome(job: &JobId, custom_id: &str, outcome: &[u8]) -> Self {
        let read: Result<RawOutcome<'_>, _> = serde_json::from_slice(outcome);
        match read {
            Ok(RawOutcome { response: Some(answer), .. }) => {
                let spent =
                    serde_json::from_str::<Spent>(answer.body.get()).ok().and_then(|spent| spent.usage);
                let spent = spent.unwrap_or_default();
                let mut result = Self::answer(job, custom_id, answer.status_code, answer.body.get());
                result.tokens = TokenCounts { input: spent.prompt_tokens, output: spent.completion_tokens };
                result
            }
            Ok(RawOutcome { error: Some(error), .. }) => Self::failed(job, custom_id, &error),
            _ => Self::unreadable(job, custom_id, "the stored outcome is no output line"),
        }
    }

    fn answer(job: &JobId, custom_id: &str, status: u16, body: &str) -> Self {
        // A line break can stand between tokens only, where a space means the same.
        let body = body.replace(['\n', '\r'], " ");
        let text = format!(
            "{{\"id\":\"batch_req_{job}\",\"custom_id\":{},\"response\":{{\"status_code\":{status},\
             \"request_id\":\"{job}\",\"body\":{body}}},\"error\":null}}\n",
            quoted(custom_id)
        );
        Self { answered: (200..300).contains(&status), late: false, tokens: TokenCounts::default(), text }
    }

    fn failed(job: &JobId, custom_id: &str, error: &LineError) -> Self {
        match error.code {
            ErrorCode::DeadlineExceeded => Self::given_up(job, custom_id, BatchStatus::Expired),
            ErrorCode::Cancelled => Self::given_up(job, custom_id, BatchStatus::Cancelled),
            _ => {
                let error = ApiError::of_job(error);
                Self::answer(job, custom_id, error.code.row().0, &error.body().to_string())
            }
        }
    }

    /// Of an outcome that is there and cannot be read.
    pub fn unreadable(job: &JobId, custom_id: &str, reason: &str) -> Self {
        Self::without_answer(job, custom_id, ("outcome_unreadable", reason))
    }

    /// Of a line whose batch was over before it had an outcome.
    pub fn given_up(job: &JobId, custom_id: &str, why: BatchStatus) -> Self {
        let late = why == BatchStatus::Expired;
        let told = match late {
            true => ("batch_expired", "the completion window was over before this request was answered"),
            false => ("batch_cancelled", "the batch was cancelled before this request was answered"),
        };
        Self { late, ..Self::without_answer(job, custom_id, told) }
    }

    fn without_answer(job: &JobId, custom_id: &str, (code, message): (&str, &str)) -> Self {
        let error = json!({"code": code, "message": message});
        let text = format!(
            "{{\"id\":\"batch_req_{job}\",\"custom_id\":{},\"response\":null,\"error\":{error}}}\n",
            quoted(custom_id)
        );
        Self { answered: false, late: false, tokens: TokenCounts::default(), text }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn result(outcome: &str) -> (LineResult, Value) {
        let result = LineResult::of_outcome(&job_id("batch_0a", 7), "my \"id\"", outcome.as_bytes());
        assert!(result.text.ends_with('\n') && result.text.lines().count() == 1, "{}", result.text);
        let value: Value = serde_json::from_str(&result.text).unwrap();
        assert_eq!(
            (value["id"].as_str(), value["custom_id"].as_str()),
            (Some("batch_req_batch-0a-7"), Some("my \"id\""))
        );
        (result, value)
    }

    #[test]
    fn an_answer_is_the_stored_bytes() {
        let usage = r#"{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}"#;
        let body = &format!(r#"{{"z":1.10,"usage":{usage},"a":[1e-7,"\u00e9"]}}"#);
        let response = format!(r#"{{"status_code":200,"request_id":"j","body":{body}}}"#);
        let (result, _) =
            result(&format!(r#"{{"id":"j","custom_id":"j","response":{response},"error":null}}"#));
        assert!(result.answered && result.text.contains(body), "{}", result.text);
        assert_eq!(result.tokens, TokenCounts { input: 3, output: 4 });
    }

    #[test]
    fn errors_are_those_of_the_api() {
        let error = |code: &str| {
            let error = format!(r#"{{"code":"{code}","message":"top_p: 3 is not 0 to 1"}}"#);
            result(&format!(r#"{{"id":"j","custom_id":"j","response":null,"error":{error}}}"#))
        };
        let (refused, value) = error("INVALID_REQUEST");
        assert!(!refused.answered && !refused.late && value["error"].is_null());
        assert_eq!(value["response"]["status_code"], 400);
        assert_eq!(value["response"]["body"]["error"]["param"], "top_p");
        let (late, value) = error("DEADLINE_EXCEEDED");
        assert!(late.late && value["response"].is_null() && value["error"]["code"] == "batch_expired");
        let (cancelled, value) = error("CANCELLED");
        assert!(!cancelled.late && value["error"]["code"] == "batch_cancelled");
        for unreadable in ["", "{}", "[]", "{\"output\":1}"] {
            assert_eq!(result(unreadable).1["error"]["code"], "outcome_unreadable", "{unreadable}");
        }
    }
}
