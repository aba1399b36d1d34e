//! How long outputs become: learned from the sequences that ended, so that blocks are set aside for what a sequence
//! will probably generate and not for all that it may. Pure.
//!
//! Lengths are kept as a histogram with buckets a quarter of an octave wide, whose weights halve every
//! [`HALF_LIFE`] ends. The estimate for a sequence that has generated `g` tokens is the mean of the lengths beyond
//! `g`, together with one sequence of `max(2g, LENGTH_ASSUMED)` tokens that nobody saw: before anything ended, and
//! beyond all that did, the longer an output is, the longer it is expected to go on.

/// Tokens of an output before any was seen.
const LENGTH_ASSUMED: f64 = 64.0;

/// Sequences that end until what was learned weighs half.
const HALF_LIFE: f64 = 512.0;

/// Buckets to an octave.
const PER_OCTAVE: f64 = 4.0;

/// Buckets: up to 2^24 tokens, beyond every model's length.
const BUCKETS: usize = 24 * PER_OCTAVE as usize + 1;

/// The weight and the sum of lengths of the sequences in a range of lengths.
#[derive(Debug, Clone, Copy, Default)]
struct Mass {
    weight: f64,
    tokens: f64,
}

/// The lengths of the outputs that ended.
#[derive(Debug, Clone)]
pub struct OutputLengths {
    /// By bucket.
    buckets: [Mass; BUCKETS],
    /// Of each bucket and those above it.
    beyond: [Mass; BUCKETS],
}

impl Default for OutputLengths {
    fn default() -> Self {
        Self { buckets: [Mass::default(); BUCKETS], beyond: [Mass::default(); BUCKETS] }
    }
}

impl OutputLengths {
    /// A sequence has ended after so many tokens.
    pub fn record(&mut self, tokens: usize) {
        let fade = (-1.0 / HALF_LIFE).exp2();
        for mass in &mut self.buckets {
            (mass.weight, mass.tokens) = (mass.weight * fade, mass.tokens * fade);
        }
        let mass = &mut self.buckets[bucket(tokens)];
        (mass.weight, mass.tokens) = (mass.weight + 1.0, mass.tokens + tokens as f64);
        let mut sum = Mass::default();
        for (beyond, mass) in self.beyond.iter_mut().zip(&self.buckets).rev() {
            sum = Mass { weight: sum.weight + mass.weight, tokens: sum.tokens + mass.tokens };
            *beyond = sum;
        }
    }

    /// Tokens that a sequence is expected to generate after the `generated` ones, at least 1.
    pub fn expected_after(&self, generated: usize) -> usize {
        let longer = if generated == 0 { 0 } else { bucket(generated) + 1 };
        let Mass { weight, tokens } = self.beyond.get(longer).copied().unwrap_or_default();
        let unseen = (2.0 * generated as f64).max(LENGTH_ASSUMED);
        let length = (tokens + unseen) / (weight + 1.0);
        (length - generated as f64).ceil().max(1.0) as usize
    }
}

/// The bucket of a length: the first one holds 0 and 1.
fn bucket(tokens: usize) -> usize {
    ((tokens.max(1) as f64).log2() * PER_OCTAVE).floor().min((BUCKETS - 1) as f64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learned(lengths: impl IntoIterator<Item = usize>) -> OutputLengths {
        let mut learned = OutputLengths::default();
        lengths.into_iter().for_each(|length| learned.record(length));
        learned
    }

    #[test]
    fn nothing_seen_is_a_short_answer_that_goes_on_as_long_as_it_did() {
        let lengths = OutputLengths::default();
        assert_eq!(lengths.expected_after(0), 64);
        assert_eq!(lengths.expected_after(20), 44);
        assert_eq!(lengths.expected_after(1000), 1000);
    }

    #[test]
    fn the_mean_of_what_ended_is_expected() {
        let lengths = learned((0..400).map(|at| if at % 2 == 0 { 10 } else { 200 }));
        assert!((100..=105).contains(&lengths.expected_after(0)), "{}", lengths.expected_after(0));
        assert!((148..=151).contains(&lengths.expected_after(50)), "short ones are over by then");
        assert_eq!(lengths.expected_after(300), 300, "nobody came so far");
    }

    #[test]
    fn what_is_old_is_forgotten() {
        let lengths = learned(std::iter::repeat_n(1000, 2000).chain(std::iter::repeat_n(20, 5000)));
        assert!(lengths.expected_after(0) < 25, "{}", lengths.expected_after(0));
    }

    /// The sum over many sequences is what admission adds up: it is near the truth for outputs of a long tail.
    #[test]
    fn many_sequences_together_need_what_is_expected() {
        // Quantiles of a log-normal distribution, in an order without a trend.
        let length = |at: usize| {
            let uniform = ((at * 377) % 1000) as f64 / 1000.0 + 0.0005;
            (5.0 + 1.0 * (uniform / (1.0 - uniform)).ln() * 0.6).exp() as usize + 1
        };
        let lengths = learned((0..2000).map(length));
        for generated in [0, 50, 200, 600] {
            let after: Vec<usize> = (0..1000).map(length).filter(|&length| length > generated).collect();
            let truth =
                after.iter().map(|length| length - generated).sum::<usize>() as f64 / after.len() as f64;
            let expected = lengths.expected_after(generated) as f64;
            assert!(
                (0.85..=1.15).contains(&(expected / truth)),
                "after {generated}: {expected}, in truth {truth}"
            );
        }
    }
}
