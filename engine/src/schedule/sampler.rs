//! How a sequence's next token is to be chosen: request and tokens so far, in the form the kernels take.
//!
//! The random numbers of a token are a function of the request's seed and the token's position alone, so that
//! the same token comes out in any batch, after a preemption and in another attempt. Pure.

use millrace_kernels::sampling::{ChosenToken, SampleRow};

use super::request::{Logprobs, Token};
use super::sequence::Sequence;

/// The row for the token that follows the last one. Where it penalises, no token is awaited.
pub fn row(sequence: &Sequence) -> SampleRow<'_> {
    let sampling = &sequence.sampling;
    SampleRow {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        top_k: sampling.top_k,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        logit_bias: &sampling.logit_bias,
        prompt: &sequence.tokens()[..sequence.prompt_len()],
        output: sequence.output(),
        seed: sequence.seed,
        position: sequence.length() as u32,
        logprobs: sampling.logprobs,
    }
}

/// A choice of the kernels as it is reported.
pub fn token(choice: ChosenToken) -> Token {
    let logprobs = choice.logprobs.map(|values| Logprobs { chosen: values.chosen, top: values.top });
    Token { id: choice.token, logprobs }
}
