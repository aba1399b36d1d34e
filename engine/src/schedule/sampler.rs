//! How a sequence's next token is to be chosen: request and tokens so far, in the form the kernels take.
//!
//! The random numbers of a token are a function of the request's seed and the token's position alone, so that
//! the same token comes out in any batch, after a preemption and in another attempt. Pure.

use millrace_kernels::sampling::{ChosenToken, SampleRow};

use super::request::{Logprobs, Token};
use super::sequence::Sequence;

/// The row for the token that follows the last one. Where it [needs the tokens](needs_tokens), none is awaited.
pub fn row(sequence: &Sequence) -> SampleRow<'_> {
    let sampling = &sequence.sampling;
    let forced = sequence.prompt_len() + sampling.forced.len();
    let row = SampleRow {
        logit_bias: sequence.bias(),
        seed: sequence.seed,
        position: sequence.length() as u32,
        logprobs: sampling.logprobs,
        ..SampleRow::GREEDY
    };
    if sequence.length() < forced {
        return row;
    }
    SampleRow {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        prompt: &sequence.tokens()[..forced.min(sequence.tokens().len())],
        output: sequence.tokens().get(forced..).unwrap_or_default(),
        ..row
    }
}

/// Whether the row depends on the tokens so far.
pub fn needs_tokens(sequence: &Sequence) -> bool {
    row(sequence).penalises() || !sequence.sampling.bad_words.is_empty()
}

/// A choice of the kernels as it is reported.
pub fn token(choice: ChosenToken) -> Token {
    let logprobs = choice.logprobs.map(|values| Logprobs { chosen: values.chosen, top: values.top });
    Token { id: choice.token, logprobs }
}

#[cfg(test)]
mod tests {
    use super::super::request::{Finish, Request, Sampling};
    use super::*;

    const BLOCK_TOKENS: usize = 4;

    fn sequence(sampling: Sampling) -> Sequence {
        let request = Request { prompt: vec![1, 2], max_tokens: 8, stop_tokens: vec![9], sampling, seed: 3 };
        Sequence::new(request, BLOCK_TOKENS)
    }

    fn barred(sequence: &Sequence) -> Vec<u32> {
        row(sequence).logit_bias.iter().filter(|(_, bias)| *bias < -1e20).map(|(token, _)| *token).collect()
    }

    #[test]
    fn stop_tokens_are_barred_until_there_are_enough() {
        let bias = vec![(5, 1.0)];
        let mut sequence =
            sequence(Sampling { min_tokens: 2, logit_bias: bias.clone(), ..Sampling::default() });
        for token in [3, 4] {
            assert_eq!(barred(&sequence), [9]);
            sequence.append(token, BLOCK_TOKENS);
        }
        assert_eq!(row(&sequence).logit_bias, bias);
        assert!(!needs_tokens(&sequence), "how many there are is known before they are");
    }

    #[test]
    fn the_last_token_of_a_word_is_barred_where_the_others_stand() {
        let words = vec![vec![7], vec![3, 4], vec![2, 6]];
        let mut sequence = sequence(Sampling { bad_words: words, ..Sampling::default() });
        assert!(needs_tokens(&sequence));
        assert_eq!(barred(&sequence), [7], "the prompt's tokens begin no word");
        sequence.append(3, BLOCK_TOKENS);
        assert_eq!(barred(&sequence), [7, 4]);
        sequence.append(5, BLOCK_TOKENS);
        assert_eq!(barred(&sequence), [7]);
    }

    #[test]
    fn forced_tokens_are_chosen_end_nothing_and_are_no_output() {
        let sampling = Sampling {
            forced: vec![9, 4],
            temperature: 1.0,
            frequency_penalty: 1.0,
            logprobs: Some(2),
            ..Sampling::default()
        };
        let mut sequence = sequence(sampling);
        for token in [9, 4] {
            let forced = row(&sequence);
            assert!(forced.temperature == 0.0 && !forced.penalises() && forced.logprobs == Some(2));
            assert!(matches!(forced.logit_bias, [(chosen, bias)] if *chosen == token && *bias > 1e20));
            assert_eq!(sequence.append(token, BLOCK_TOKENS), None);
        }
        let free = row(&sequence);
        assert_eq!((free.prompt, free.output), ([1, 2, 9, 4].as_slice(), [].as_slice()));
        assert!(free.penalises() && free.logit_bias.is_empty());
        assert_eq!(sequence.append(9, BLOCK_TOKENS), Some(Finish::Stop));
    }
}
