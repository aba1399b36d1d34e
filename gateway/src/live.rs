//! An answer while it is made: token deltas on core NATS, the stored outcome as the last word.
//!
//! Deltas may be lost, and a second attempt starts anew. What is printed cannot be taken back, so text is
//! printed only while it continues what stands there; the outcome then gives the rest, or the whole.

use std::collections::BTreeMap;

use async_nats::{Message, Subscriber};
use millrace_crds::job::header;
use millrace_crds::names::JobId;
use millrace_crds::result::OutputLine;
use millrace_crds::tokens::TokenDelta;

use crate::connect::Connection;
use crate::failure::Failure;
use crate::output::{line, note, piece};

/// Deltas held while one before them is missing; past that, the gap stays.
const HELD_MAX: usize = 256;

/// The text of one choice, as far as it is known to be right. Pure.
#[derive(Debug, Default)]
pub struct LiveText {
    attempt: u64,
    next_number: u64,
    held: BTreeMap<u64, String>,
    attempt_text: String,
    printed: String,
}

/// What the outcome adds to what was printed.
#[derive(Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The rest of the text.
    Rest(String),
    /// Other text than what was printed: the whole of it.
    Whole(String),
}

impl LiveText {
    /// Takes a delta of this choice; gives the text to print.
    pub fn take(&mut self, attempt: u64, delta: TokenDelta) -> String {
        if attempt < self.attempt {
            return String::new();
        }
        if attempt > self.attempt {
            let printed = std::mem::take(&mut self.printed);
            *self = LiveText { attempt, printed, ..LiveText::default() };
        }
        if delta.number >= self.next_number && self.held.len() < HELD_MAX {
            self.held.insert(delta.number, delta.text);
        }
        while let Some(text) = self.held.remove(&self.next_number) {
            self.attempt_text += &text;
            self.next_number += 1;
        }
        // A new attempt repeats the text of the last one: only what goes beyond it is new.
        let Some(new) = self.attempt_text.strip_prefix(self.printed.as_str()).map(str::to_owned) else {
            return String::new();
        };
        self.printed += &new;
        new
    }

    /// Ends with the text of the outcome.
    pub fn end(self, text: &str) -> StreamEnd {
        match text.strip_prefix(self.printed.as_str()) {
            Some(rest) => StreamEnd::Rest(rest.to_owned()),
            None => StreamEnd::Whole(text.to_owned()),
        }
    }
}

/// The attempt and the delta of a message. What is none is skipped: the outcome brings the text.
pub fn delta_of(message: &Message) -> Option<(u64, TokenDelta)> {
    let attempt = message.headers.as_ref().and_then(|headers| headers.get(header::ATTEMPT));
    let attempt = attempt.and_then(|text| text.as_str().parse().ok()).unwrap_or(1);
    Some((attempt, serde_json::from_slice(&message.payload).ok()?))
}

/// The text of a line's first choice.
pub fn text_of(line: &OutputLine) -> Option<&str> {
    let choice = line.response.as_ref()?.body.get("choices")?.get(0)?;
    let chat = choice.get("message").and_then(|message| message.get("content"));
    chat.or_else(|| choice.get("text"))?.as_str()
}

/// Prints the text of a line's first choice, or why there is none.
pub fn print_whole(outcome: &OutputLine) {
    match &outcome.error {
        Some(error) => note(&format!("error: {}: {}", error.code.as_str(), error.message)),
        None => line(text_of(outcome).unwrap_or_default()),
    }
}

/// The deltas of one job, printed as they come.
pub struct Live {
    deltas: Subscriber,
    text: LiveText,
    json: bool,
}

impl Live {
    /// Listens; to be called before the job is published.
    ///
    /// # Errors
    /// [`Failure::Refused`].
    pub async fn listen(broker: &Connection, job: &JobId, json: bool) -> Result<Self, Failure> {
        let refused = |e: &dyn std::fmt::Display| Failure::Refused(format!("token deltas of job {job}: {e}"));
        let subject = broker.model.tokens_subject(job);
        let deltas = broker.client.subscribe(subject).await.map_err(|e| refused(&e))?;
        // The broker knows of the subscription before the job can start.
        broker.client.flush().await.map_err(|e| refused(&e))?;
        Ok(Self { deltas, text: LiveText::default(), json })
    }

    /// Prints deltas until the future is dropped.
    pub async fn print(&mut self) {
        use futures::StreamExt;
        while let Some(message) = self.deltas.next().await {
            let Some((attempt, delta)) = delta_of(&message) else { continue };
            if self.json {
                piece(&(serde_json::to_string(&delta).expect("our own types are JSON") + "\n"));
            } else if (delta.request, delta.choice) == (0, 0) {
                piece(&self.text.take(attempt, delta));
            }
        }
        std::future::pending::<()>().await
    }

    /// Prints what the outcome adds.
    pub fn end(self, outcome: &OutputLine) {
        if self.json {
            return;
        }
        if outcome.error.is_some() {
            piece("\n");
            print_whole(outcome);
            return;
        }
        match self.text.end(text_of(outcome).unwrap_or_default()) {
            StreamEnd::Rest(rest) => piece(&(rest + "\n")),
            StreamEnd::Whole(whole) => {
                piece("\n");
                note("deltas were lost; the stored answer is:");
                piece(&(whole + "\n"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(number: u64, text: &str) -> TokenDelta {
        TokenDelta { number, request: 0, choice: 0, text: text.into(), finish_reason: None }
    }

    #[test]
    fn deltas_are_put_in_order() {
        let mut live = LiveText::default();
        assert_eq!(live.take(1, delta(0, "a")), "a");
        assert_eq!(live.take(1, delta(2, "c")), "");
        assert_eq!(live.take(1, delta(1, "b")), "bc");
        assert_eq!(live.take(1, delta(1, "b")), "", "one that comes twice");
        assert_eq!(live.end("abcd"), StreamEnd::Rest("d".into()));
    }

    #[test]
    fn a_second_attempt_does_not_repeat_what_stands_there() {
        let mut live = LiveText::default();
        live.take(1, delta(0, "hello wor"));
        assert_eq!(live.take(2, delta(0, "hello")), "");
        assert_eq!(live.take(1, delta(1, "stale")), "");
        assert_eq!(live.take(2, delta(1, " world")), "ld");
        assert_eq!(live.end("hello world"), StreamEnd::Rest(String::new()));
    }

    #[test]
    fn a_gap_is_filled_by_the_outcome() {
        let mut live = LiveText::default();
        live.take(1, delta(0, "a"));
        live.take(1, delta(2, "c"));
        assert_eq!(live.end("abc"), StreamEnd::Rest("bc".into()));
        let mut live = LiveText::default();
        live.take(1, delta(0, "x"));
        assert_eq!(live.end("abc"), StreamEnd::Whole("abc".into()));
    }
}
