//! A text from a place on: what a client gets that has its beginning already.
//!
//! A place is a number of characters (Unicode scalar values) of the stored text. It does not depend on how the text was
//! cut into deltas, so that any gateway can go on where another one stopped, whatever deltas it heard.

use millrace_crds::tokens::TokenDelta;

use crate::http::error::{ApiCode, ApiError};
use crate::live::{LiveText, StreamEnd};

/// A piece of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passage {
    /// The piece.
    pub text: String,
    /// The place behind it.
    pub end: u64,
}

/// The text of one choice from a place on. Pure.
#[derive(Debug, Default)]
pub struct TextTail {
    live: LiveText,
    from: u64,
    seen: u64,
}

impl TextTail {
    /// What comes behind this place.
    pub fn from(place: u64) -> Self {
        Self { from: place, ..Self::default() }
    }

    /// Takes a delta; gives what it adds behind the place.
    pub fn take(&mut self, attempt: u64, delta: TokenDelta) -> Option<Passage> {
        let text = self.live.take(attempt, delta);
        self.beyond(&text)
    }

    /// Ends with the stored text; gives what is missing.
    ///
    /// # Errors
    /// [`ApiCode::StreamDiverged`] when what was given is not how the stored text begins.
    pub fn end(&mut self, text: &str) -> Result<Option<Passage>, ApiError> {
        match std::mem::take(&mut self.live).end(text) {
            StreamEnd::Rest(rest) => Ok(self.beyond(&rest)),
            // Text before the place is what another stream gave, of the stored text: only what was given here counts.
            StreamEnd::Whole(_) if self.seen <= self.from => {
                self.seen = 0;
                Ok(self.beyond(text))
            }
            StreamEnd::Whole(_) => {
                let message = "what was streamed is not how the stored answer begins; ask again";
                Err(ApiError::new(ApiCode::StreamDiverged, message))
            }
        }
    }

    fn beyond(&mut self, text: &str) -> Option<Passage> {
        let begin = self.seen;
        self.seen += text.chars().count() as u64;
        let skipped = self.from.saturating_sub(begin) as usize;
        let text: String = text.chars().skip(skipped).collect();
        (!text.is_empty()).then_some(Passage { text, end: self.seen })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn delta(number: usize, text: &str) -> TokenDelta {
        TokenDelta { number: number as u64, request: 0, choice: 0, text: text.into(), finish_reason: None }
    }

    #[test]
    fn what_diverges_before_the_place_does_not_matter() {
        let mut tail = TextTail::from(3);
        assert_eq!(tail.take(1, delta(0, "xyz")), None);
        assert_eq!(tail.end("abcd").unwrap(), Some(Passage { text: "d".into(), end: 4 }));
        let mut tail = TextTail::from(1);
        assert_eq!(tail.take(1, delta(0, "xyz")), Some(Passage { text: "yz".into(), end: 3 }));
        assert_eq!(tail.end("abcd").unwrap_err().code, ApiCode::StreamDiverged);
    }

    proptest! {
        /// A client that is cut off anywhere, and goes on elsewhere with other deltas, has the stored text in the end.
        #[test]
        fn two_streams_are_one_text(
            pieces in prop::collection::vec("[a-zé😀 ]{0,4}", 0..20),
            heard in prop::collection::vec(0usize..20, 0..40),
            late in prop::collection::vec(0usize..20, 0..40),
            cut in 0usize..40,
        ) {
            let whole: String = pieces.concat();
            let (mut text, mut place) = (String::new(), 0);
            let mut first = TextTail::default();
            for at in heard.into_iter().take(cut) {
                if let Some(passage) = pieces.get(at).and_then(|piece| first.take(1, delta(at, piece))) {
                    text += &passage.text;
                    place = passage.end;
                }
            }
            let mut second = TextTail::from(place);
            let mut more: Vec<Passage> =
                late.iter().filter_map(|at| second.take(2, delta(*at, pieces.get(*at)?))).collect();
            more.extend(second.end(&whole).unwrap());
            more.iter().for_each(|passage| text += &passage.text);
            prop_assert_eq!(text, whole);
            prop_assert!(more.windows(2).all(|two| two[0].end < two[1].end));
            prop_assert!(more.first().is_none_or(|first| first.end > place));
        }
    }
}
