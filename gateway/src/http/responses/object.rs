//! A response as clients see it: what was asked, and what became of its job.

use millrace_crds::result::ErrorCode;
use serde_json::{Map, Value, json};

use crate::http::error::{ApiCode, ApiError};
use crate::http::responses::records::ResponseRecord;

/// What became of a response's job.
#[derive(Debug, Clone, Copy)]
pub enum ResponseState<'a> {
    /// It waits, or runs.
    Queued,
    /// It runs.
    InProgress,
    /// It has its answer, in the form of chats.
    Answered(&'a Value),
    /// It has none, and gets none.
    Failed(&'a ApiError),
}

/// The first choice of an answer, as text.
pub fn text_of(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_default()
}

/// Whether an answer stopped at its limit.
fn is_cut(answer: &Value) -> bool {
    answer["choices"][0]["finish_reason"] == "length"
}

/// The only item of a response's output.
pub fn item(id: &str, status: &str, content: &[Value]) -> Value {
    json!({"id": format!("msg_{id}"), "type": "message", "status": status, "role": "assistant", "content": content})
}

/// The only part of the item.
pub fn part(text: &str, logprobs: &Value) -> Value {
    let logprobs = logprobs["content"].as_array().cloned().unwrap_or_default();
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
}

/// The item with the whole answer.
pub fn whole_item(id: &str, answer: &Value) -> Value {
    let status = if is_cut(answer) { "incomplete" } else { "completed" };
    item(id, status, &[part(text_of(answer), &answer["choices"][0]["logprobs"])])
}

fn usage(answer: &Value) -> Value {
    let usage = &answer["usage"];
    let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
    json!({
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    })
}

/// OpenAI's object.
pub fn object(id: &str, record: &ResponseRecord, state: ResponseState<'_>) -> Value {
    let echo = |name: &str| record.echo.get(name).cloned().unwrap_or(Value::Null);
    let status = match state {
        ResponseState::Queued => "queued",
        ResponseState::InProgress => "in_progress",
        ResponseState::Answered(answer) if is_cut(answer) => "incomplete",
        ResponseState::Answered(_) => "completed",
        ResponseState::Failed(error) if error.code == ApiCode::Job(ErrorCode::Cancelled) => "cancelled",
        ResponseState::Failed(_) => "failed",
    };
    let (mut output, mut spent, mut failure) = (Vec::new(), Value::Null, Value::Null);
    match state {
        ResponseState::Answered(answer) => {
            output.push(whole_item(id, answer));
            spent = usage(answer);
        }
        ResponseState::Failed(error) if status == "failed" => {
            failure = json!({"code": error.code.row().2, "message": error.message});
        }
        _ => {}
    }
    let details = if status == "incomplete" { json!({"reason": "max_output_tokens"}) } else { Value::Null };
    let metadata = record.echo.get("metadata").cloned().unwrap_or_else(|| Map::new().into());
    json!({
        "id": id, "object": "response", "created_at": record.created, "status": status,
        "background": record.background, "error": failure, "incomplete_details": details,
        "instructions": echo("instructions"), "max_output_tokens": echo("max_output_tokens"), "model": record.model,
        "output": output, "parallel_tool_calls": true, "previous_response_id": echo("previous_response_id"),
        "reasoning": {"effort": null, "summary": null}, "store": record.store, "temperature": echo("temperature"),
        "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
        "top_logprobs": echo("top_logprobs"), "top_p": echo("top_p"), "truncation": "disabled", "usage": spent,
        "user": echo("user"), "metadata": metadata,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ResponseRecord {
        let echo = json!({"metadata": {"a": "b"}, "temperature": 0.5});
        let echo = echo.as_object().unwrap().clone();
        ResponseRecord { created: 7, model: "m".into(), echo, store: true, ..ResponseRecord::default() }
    }

    #[test]
    fn an_answer_is_one_item() {
        let choice = json!({"message": {"content": "hi"}, "finish_reason": "stop", "logprobs": null});
        let usage = json!({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3});
        let mut answer = json!({"choices": [choice], "usage": usage});
        let seen = object("resp_1", &record(), ResponseState::Answered(&answer));
        assert_eq!((&seen["status"], &seen["created_at"]), (&json!("completed"), &json!(7)));
        assert_eq!(seen["output"][0]["content"][0]["text"], "hi");
        assert_eq!((&seen["usage"]["input_tokens"], &seen["usage"]["output_tokens"]), (&json!(1), &json!(2)));
        assert_eq!((&seen["metadata"]["a"], &seen["temperature"]), (&json!("b"), &json!(0.5)));
        answer["choices"][0]["finish_reason"] = json!("length");
        let cut = object("resp_1", &record(), ResponseState::Answered(&answer));
        assert_eq!(cut["status"], "incomplete");
        assert_eq!(cut["incomplete_details"]["reason"], "max_output_tokens");
    }

    #[test]
    fn without_an_answer_the_output_is_empty() {
        let failed = ApiError::new(ApiCode::Job(ErrorCode::WorkerLost), "gone");
        let cancelled = ApiError::new(ApiCode::Job(ErrorCode::Cancelled), "cancelled");
        for (state, status, code) in [
            (ResponseState::Queued, "queued", Value::Null),
            (ResponseState::Failed(&failed), "failed", json!("worker_lost")),
            (ResponseState::Failed(&cancelled), "cancelled", Value::Null),
        ] {
            let seen = object("resp_1", &record(), state);
            // Python's client fails on a response without the list.
            assert_eq!((&seen["status"], &seen["output"]), (&json!(status), &json!([])));
            assert_eq!(seen["error"]["code"], code);
        }
    }
}
