//! The events of a streamed response, numbered so that any gateway goes on where another one stopped.
//!
//! An event's number follows from the stored answer alone, not from how the text came: 0 to 3 open the response and its
//! text, a delta has 3 and the characters of the text up to its end, and the four that close them follow the last
//! character. Numbers grow, with gaps. A response that failed has one last event behind all that a client can have.

use millrace_crds::tokens::TokenDelta;
use serde_json::{Value, json};

use crate::http::error::ApiError;
use crate::http::passage::{Passage, TextTail};
use crate::http::responses::object::{ResponseState, item, object, part, text_of, whole_item};
use crate::http::responses::records::ResponseRecord;

/// The number of the last event before the text.
const BEFORE_TEXT: u64 = 3;

/// A streamed response: deltas in, events out, and the stored outcome has the last word. Pure.
#[derive(Debug)]
pub struct ResponseEvents {
    id: String,
    record: ResponseRecord,
    tail: TextTail,
    /// The last number that the client has.
    after: Option<u64>,
    begun: bool,
    last: u64,
}

/// How a stream ends.
#[derive(Debug)]
pub struct ResponseEnd {
    /// The events that are missing.
    pub events: Vec<Value>,
    /// Whether the outcome gave text that no delta had brought.
    pub healed: bool,
}

impl ResponseEvents {
    /// All events of a response, or those behind a number.
    pub fn new(id: String, record: ResponseRecord, after: Option<u64>) -> Self {
        let place = after.unwrap_or(0).saturating_sub(BEFORE_TEXT);
        Self { id, record, tail: TextTail::from(place), after, begun: false, last: 0 }
    }

    fn number(&mut self, number: u64, mut event: Value) -> Option<Value> {
        if self.after.is_some_and(|after| number <= after) {
            return None;
        }
        self.last = number;
        event["sequence_number"] = number.into();
        Some(event)
    }

    fn state(&mut self, number: u64, kind: &str, state: ResponseState<'_>) -> Option<Value> {
        let response = object(&self.id, &self.record, state);
        self.number(number, json!({"type": kind, "response": response}))
    }

    /// The first event.
    pub fn open(&mut self) -> Vec<Value> {
        self.state(0, "response.created", ResponseState::Queued).into_iter().collect()
    }

    /// What comes before the text, once.
    fn begin(&mut self) -> Vec<Value> {
        if std::mem::replace(&mut self.begun, true) {
            return Vec::new();
        }
        let item = item(&self.id, "in_progress", &[]);
        let added = json!({"type": "response.output_item.added", "output_index": 0, "item": item});
        let part = part("", &Value::Null);
        let opened = self.of_part("response.content_part.added", json!({"part": part}));
        let running = self.state(1, "response.in_progress", ResponseState::InProgress);
        let events = [running, self.number(2, added), self.number(BEFORE_TEXT, opened)];
        events.into_iter().flatten().collect()
    }

    /// An event of the only part.
    fn of_part(&self, kind: &str, rest: Value) -> Value {
        let id = format!("msg_{}", self.id);
        let mut event = json!({"type": kind, "item_id": id, "output_index": 0, "content_index": 0});
        for (name, value) in rest.as_object().into_iter().flatten() {
            event[name] = value.clone();
        }
        event
    }

    fn delta(&mut self, passage: Passage) -> Option<Value> {
        let event =
            self.of_part("response.output_text.delta", json!({"delta": passage.text, "logprobs": []}));
        self.number(BEFORE_TEXT + passage.end, event)
    }

    /// Takes a delta; gives what it adds.
    pub fn take(&mut self, attempt: u64, delta: TokenDelta) -> Vec<Value> {
        if (delta.request, delta.choice) != (0, 0) {
            return Vec::new();
        }
        let Some(passage) = self.tail.take(attempt, delta) else { return Vec::new() };
        let mut events = self.begin();
        events.extend(self.delta(passage));
        events
    }

    /// Ends with the stored answer, or with the reason why there is none.
    ///
    /// # Errors
    /// [`crate::http::error::ApiCode::StreamDiverged`].
    pub fn end(&mut self, answer: Result<&Value, &ApiError>) -> Result<ResponseEnd, ApiError> {
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                let number = self.last.max(self.after.unwrap_or(0)).max(1) + 1;
                let event = self.state(number, "response.failed", ResponseState::Failed(error));
                return Ok(ResponseEnd { events: event.into_iter().collect(), healed: false });
            }
        };
        let text = text_of(answer);
        let rest = self.tail.end(text)?;
        let mut events = self.begin();
        let healed = rest.is_some();
        events.extend(rest.and_then(|passage| self.delta(passage)));
        let mut number = BEFORE_TEXT + text.chars().count() as u64;
        let logprobs = &answer["choices"][0]["logprobs"];
        let part = part(text, logprobs);
        let done = json!({"text": text, "logprobs": part["logprobs"]});
        let item = whole_item(&self.id, answer);
        for event in [
            self.of_part("response.output_text.done", done),
            self.of_part("response.content_part.done", json!({"part": part})),
            json!({"type": "response.output_item.done", "output_index": 0, "item": item}),
        ] {
            number += 1;
            events.extend(self.number(number, event));
        }
        let kind = match item["status"] == "incomplete" {
            true => "response.incomplete",
            false => "response.completed",
        };
        events.extend(self.state(number + 1, kind, ResponseState::Answered(answer)));
        Ok(ResponseEnd { events, healed })
    }

    /// The event of what went wrong with the stream itself.
    pub fn error(&mut self, error: &ApiError) -> Value {
        let body = error.body()["error"].take();
        let (code, message, param) = (&body["code"], &body["message"], &body["param"]);
        let number = self.last.max(self.after.unwrap_or(0)) + 1;
        json!({"type": "error", "code": code, "message": message, "param": param, "sequence_number": number})
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::http::error::ApiCode;

    fn events(after: Option<u64>) -> ResponseEvents {
        ResponseEvents::new("resp_1".into(), ResponseRecord::default(), after)
    }

    fn delta(number: u64, text: &str) -> TokenDelta {
        TokenDelta { number, request: 0, choice: 0, text: text.into(), finish_reason: None }
    }

    fn answer(text: &str) -> Value {
        let choice = json!({"message": {"content": text}, "finish_reason": "stop", "logprobs": null});
        json!({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}})
    }

    fn numbers(events: &[Value]) -> Vec<u64> {
        events.iter().filter_map(|event| event["sequence_number"].as_u64()).collect()
    }

    #[test]
    fn a_response_in_the_clients_form() {
        let mut writer = events(None);
        let mut seen = writer.open();
        seen.extend(writer.take(1, delta(0, "hel")));
        seen.extend(writer.take(1, delta(1, "lo")));
        let end = writer.end(Ok(&answer("hello"))).unwrap();
        assert!(!end.healed);
        seen.extend(end.events);
        let kinds: Vec<_> = seen.iter().map(|event| event["type"].as_str().unwrap()).collect();
        let expected = [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ];
        assert_eq!(kinds, expected);
        assert_eq!(numbers(&seen), [0, 1, 2, 3, 6, 8, 9, 10, 11, 12]);
        assert_eq!(seen[9]["response"]["output"][0]["content"][0]["text"], "hello");
    }

    #[test]
    fn a_failure_is_the_last_event() {
        let error = ApiError::new(ApiCode::Internal, "x");
        let mut writer = events(None);
        writer.open();
        let end = writer.end(Err(&error)).unwrap();
        assert_eq!(numbers(&end.events), [2]);
        assert_eq!(end.events[0]["response"]["status"], "failed");
        assert_eq!(numbers(&events(Some(57)).end(Err(&error)).unwrap().events), [58]);
    }

    proptest! {
        /// Whatever the first stream heard and wherever it was cut, the second one gives exactly the rest.
        #[test]
        fn a_stream_goes_on_anywhere(
            pieces in prop::collection::vec("[a-zé ]{0,4}", 0..12),
            heard in prop::collection::vec(0usize..12, 0..30),
            kept in 0usize..30,
        ) {
            let whole: String = pieces.concat();
            let run = |after: Option<u64>, heard: &[usize]| {
                let mut writer = events(after);
                let mut seen = writer.open();
                for at in heard.iter().filter(|at| **at < pieces.len()) {
                    seen.extend(writer.take(1, delta(*at as u64, &pieces[*at])));
                }
                seen.extend(writer.end(Ok(&answer(&whole))).unwrap().events);
                seen
            };
            let mut seen = run(None, &heard);
            seen.truncate(kept);
            let after = seen.last().and_then(|event| event["sequence_number"].as_u64());
            seen.extend(run(after, &[]));
            let text: String = seen.iter().filter_map(|event| event["delta"].as_str()).collect();
            prop_assert_eq!(text, whole);
            prop_assert!(numbers(&seen).windows(2).all(|two| two[0] < two[1]));
            let last = seen.last().unwrap();
            prop_assert_eq!(&last["type"], "response.completed");
        }
    }
}
