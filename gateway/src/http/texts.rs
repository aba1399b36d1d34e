//! The texts of all choices of a job, from places on, for a client that may be slow.
//!
//! What comes waits until it is taken, in one piece for each choice. Where more waits than [`WAITING_BYTES_MAX`] it is
//! given up, and the stored outcome brings it: a slow client costs bounded memory and loses nothing.

use std::collections::BTreeMap;

use millrace_crds::tokens::TokenDelta;
use serde_json::Value;

use crate::http::error::ApiError;
use crate::http::passage::TextTail;

/// Bytes of one choice that wait for a client.
const WAITING_BYTES_MAX: usize = 64 << 10;

/// One choice.
#[derive(Debug, Default)]
struct ChoiceText {
    tail: TextTail,
    /// The place behind what was taken.
    taken: u64,
    waiting: String,
    /// The place behind what waits.
    end: u64,
    /// Whether the outcome has to bring the rest.
    given_up: bool,
}

/// A piece of one choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChoicePiece {
    /// Which choice.
    pub index: u32,
    /// The piece.
    pub text: String,
    /// The place behind it.
    pub end: u64,
}

/// The texts of all choices. Pure.
#[derive(Debug)]
pub struct JobTexts {
    /// Choices for each prompt; `None` where that is not known, so that only the outcome can tell them apart.
    n: Option<u32>,
    choices: BTreeMap<u32, ChoiceText>,
    /// Whether the outcome gave text that no delta had brought.
    pub healed: bool,
}

impl JobTexts {
    /// Of a job with `n` choices for each prompt, behind these places of its choices.
    pub fn new(n: Option<u32>, places: &[u64]) -> Self {
        let choice = |(index, place): (usize, &u64)| (index as u32, ChoiceText::from(*place));
        Self { n, choices: places.iter().enumerate().map(choice).collect(), healed: false }
    }

    /// Takes a delta.
    pub fn take(&mut self, attempt: u64, delta: TokenDelta) {
        let Some(n) = self.n else { return };
        let index = delta.request.saturating_mul(n).saturating_add(delta.choice);
        let choice = self.choices.entry(index).or_default();
        if choice.given_up {
            return;
        }
        let Some(passage) = choice.tail.take(attempt, delta) else { return };
        choice.waiting += &passage.text;
        choice.end = passage.end;
        if choice.waiting.len() > WAITING_BYTES_MAX {
            *choice = ChoiceText { given_up: true, ..ChoiceText::from(choice.taken) };
        }
    }

    /// Whether something waits.
    pub fn is_waiting(&self) -> bool {
        self.choices.values().any(|choice| !choice.waiting.is_empty())
    }

    /// What waits of the first choice of which something does.
    pub fn pop(&mut self) -> Option<ChoicePiece> {
        let (index, choice) = self.choices.iter_mut().find(|(_, choice)| !choice.waiting.is_empty())?;
        choice.taken = choice.end;
        Some(ChoicePiece { index: *index, text: std::mem::take(&mut choice.waiting), end: choice.end })
    }

    /// The places behind what was taken, of the choices in their order.
    pub fn places(&self) -> Vec<u64> {
        let count = self.choices.keys().next_back().map_or(0, |last| last + 1);
        (0..count).map(|index| self.choices.get(&index).map_or(0, |choice| choice.taken)).collect()
    }

    /// Ends with the stored answer: what is missing waits then.
    ///
    /// # Errors
    /// [`crate::http::error::ApiCode::StreamDiverged`].
    pub fn end(&mut self, answer: &Value) -> Result<(), ApiError> {
        for choice in answer["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().and_then(|index| index.try_into().ok()).unwrap_or(0);
            let text = choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
            let known = self.choices.entry(index).or_default();
            if let Some(passage) = known.tail.end(text)? {
                self.healed = true;
                known.waiting += &passage.text;
                known.end = passage.end;
            }
        }
        Ok(())
    }
}

impl ChoiceText {
    fn from(place: u64) -> Self {
        Self { tail: TextTail::from(place), taken: place, end: place, ..Self::default() }
    }
}

/// Most choices whose places a client may name.
pub const PLACES_MAX: usize = 128;

/// Places as a client gives them back: numbers with points between them.
pub fn places_of(text: &str) -> Option<Vec<u64>> {
    let places: Vec<u64> = text.split('.').map(|place| place.parse().ok()).collect::<Option<_>>()?;
    (places.len() <= PLACES_MAX && places.iter().all(|place| *place < 1 << 53)).then_some(places)
}

/// Places as they are written.
pub fn places_text(places: &[u64]) -> String {
    places.iter().map(u64::to_string).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn delta(request: u32, choice: u32, number: u64, text: &str) -> TokenDelta {
        TokenDelta { number, request, choice, text: text.into(), finish_reason: None }
    }

    fn answer(texts: &[&str]) -> Value {
        let choices = texts.iter().enumerate().map(|(index, text)| json!({"index": index, "text": text}));
        json!({"choices": choices.collect::<Vec<_>>()})
    }

    fn taken(texts: &mut JobTexts) -> Vec<(u32, String)> {
        std::iter::from_fn(|| texts.pop()).map(|piece| (piece.index, piece.text)).collect()
    }

    #[test]
    fn choices_are_numbered_through_and_their_places_kept() {
        let mut texts = JobTexts::new(Some(2), &[]);
        texts.take(1, delta(0, 0, 0, "ab"));
        texts.take(1, delta(0, 0, 1, "c"));
        texts.take(1, delta(1, 1, 0, "x"));
        assert_eq!(taken(&mut texts), [(0, "abc".into()), (3, "x".into())]);
        assert_eq!(places_text(&texts.places()), "3.0.0.1");
        let mut later = JobTexts::new(Some(2), &places_of("2.0.0.1").unwrap());
        later.end(&answer(&["abcd", "", "q", "xyz"])).unwrap();
        assert_eq!(taken(&mut later), [(0, "cd".into()), (2, "q".into()), (3, "yz".into())]);
    }

    #[test]
    fn what_a_slow_client_does_not_take_is_given_up_and_comes_with_the_outcome() {
        let mut texts = JobTexts::new(Some(1), &[]);
        texts.take(1, delta(0, 0, 0, "begin "));
        assert_eq!(taken(&mut texts), [(0, "begin ".into())]);
        let piece = "x".repeat(1000);
        for number in 1..100 {
            texts.take(1, delta(0, 0, number, &piece));
        }
        assert!(!texts.is_waiting(), "more than fits");
        let whole = format!("begin {}", piece.repeat(99));
        texts.end(&answer(&[&whole])).unwrap();
        assert_eq!(taken(&mut texts), [(0, piece.repeat(99))]);
    }

    #[test]
    fn places_have_one_form() {
        assert_eq!(places_of("0.7"), Some(vec![0, 7]));
        for wrong in ["", ".", "1.", "-1", "x", "9007199254740992", &"1.".repeat(200)] {
            assert_eq!(places_of(wrong), None, "{wrong}");
        }
    }
}
