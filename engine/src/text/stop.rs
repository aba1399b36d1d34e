//! Stop strings across token borders.
//!
//! Text goes through piece by piece; what could be the beginning of a stop string is held back until it is
//! clear. Each stop string is one Knuth-Morris-Pratt automaton (Knuth, Morris, Pratt 1977), so that a byte of
//! text costs constant time however the stop strings are made. Where several match, the one that ends first
//! wins, and of those the longest: so the result depends on the text alone, not on its division into pieces.

/// One stop string and how far the text so far matches it.
#[derive(Debug, Clone)]
struct Automaton {
    stop: Box<[u8]>,
    /// `fallback[k]`: length of the longest proper prefix of `stop` that is a suffix of `stop[..=k]`.
    fallback: Box<[u16]>,
    matched: usize,
}

impl Automaton {
    fn new(stop: &str) -> Self {
        let stop: Box<[u8]> = stop.as_bytes().into();
        let mut fallback = vec![0u16; stop.len()];
        let mut length = 0usize;
        for k in 1..stop.len() {
            while length > 0 && stop[k] != stop[length] {
                length = usize::from(fallback[length - 1]);
            }
            length += usize::from(stop[k] == stop[length]);
            fallback[k] = u16::try_from(length).expect("stop strings are shorter than 64 KiB");
        }
        Self { stop, fallback: fallback.into(), matched: 0 }
    }

    /// Whether this byte completes the stop string.
    fn push(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.stop[self.matched] != byte {
            self.matched = usize::from(self.fallback[self.matched - 1]);
        }
        self.matched += usize::from(self.stop[self.matched] == byte);
        self.matched == self.stop.len()
    }
}

/// Watches a text for stop strings.
#[derive(Debug, Clone)]
pub struct Stops {
    automata: Vec<Automaton>,
    held: String,
    include_stop: bool,
    done: bool,
}

impl Stops {
    /// Watches for `stops`, none of them empty. With `include_stop` the one that ends the text stays in it.
    pub fn new(stops: &[String], include_stop: bool) -> Self {
        let automata = stops.iter().map(|stop| Automaton::new(stop)).collect();
        Self { automata, held: String::new(), include_stop, done: false }
    }

    /// Takes more text; appends what is clear to `out`. Returns whether a stop string ended the text; from
    /// then on nothing is taken any more.
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.done {
            return true;
        }
        if self.automata.is_empty() {
            out.push_str(text);
            return false;
        }
        for (at, byte) in text.bytes().enumerate() {
            let completed = |automaton: &mut Automaton| automaton.push(byte).then_some(automaton.stop.len());
            // Every automaton takes the byte: `max` runs through all of them.
            if let Some(length) = self.automata.iter_mut().filter_map(completed).max() {
                self.held.push_str(&text[..=at]);
                let end = self.held.len() - if self.include_stop { 0 } else { length };
                out.push_str(&self.held[..end]);
                self.held.clear();
                self.done = true;
                return true;
            }
        }
        self.held.push_str(text);
        let open = self.automata.iter().map(|automaton| automaton.matched).max().unwrap_or(0);
        let clear = self.held.len() - open;
        out.push_str(&self.held[..clear]);
        self.held.drain(..clear);
        false
    }

    /// The text is over: what was held back is clear.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&std::mem::take(&mut self.held));
        self.done = true;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// By definition: the earliest end, then the longest.
    fn expected(text: &str, stops: &[String], include: bool) -> (String, bool) {
        let ends = stops.iter().filter_map(|stop| text.find(stop.as_str()).map(|at| (at + stop.len(), at)));
        match ends.min() {
            Some((end, start)) => (text[..if include { end } else { start }].to_owned(), true),
            None => (text.to_owned(), false),
        }
    }

    fn run(pieces: &[String], stops: &[String], include: bool) -> (String, bool) {
        let mut watch = Stops::new(stops, include);
        let mut out = String::new();
        for piece in pieces {
            if watch.push(piece, &mut out) {
                return (out, true);
            }
            let open = watch.held.len();
            let longest = stops.iter().map(String::len).max().unwrap_or(0);
            assert!(open < longest.max(1), "held {open} bytes");
        }
        watch.finish(&mut out);
        (out, false)
    }

    fn owned(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|&text| text.to_owned()).collect()
    }

    #[test]
    fn a_stop_string_may_lie_across_pieces() {
        let stops = owned(&["\n\nQ:", "END"]);
        let (text, stopped) = run(&owned(&["An answer", ".\n", "\n", "Q", ": next"]), &stops, false);
        assert_eq!((text.as_str(), stopped), ("An answer.", true));
        let (text, _) = run(&owned(&["An answer.\n\n", "Q: next"]), &stops, true);
        assert_eq!(text, "An answer.\n\nQ:");
    }

    #[test]
    fn what_only_looked_like_a_stop_comes_out_at_the_end() {
        let (text, stopped) = run(&owned(&["to be EN"]), &owned(&["END"]), false);
        assert_eq!((text.as_str(), stopped), ("to be EN", false));
    }

    #[test]
    fn the_match_that_ends_first_wins_then_the_longest() {
        let stops = owned(&["abcd", "bc", "c"]);
        assert_eq!(run(&owned(&["xabcd"]), &stops, false).0, "xa");
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            pieces in prop::collection::vec("[abé\u{1F600}]{0,4}", 0..12),
            stops in prop::collection::vec("[abé\u{1F600}]{1,5}", 0..4),
            include: bool,
        ) {
            let whole = pieces.concat();
            prop_assert_eq!(run(&pieces, &stops, include), expected(&whole, &stops, include));
        }
    }
}
