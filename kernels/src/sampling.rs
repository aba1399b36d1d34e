//! From one row of logits to the next token. Pure: time and state do not come in, randomness is a function of
//! (seed, position) alone, so a row's token never depends on its batch mates or on the attempt.
//!
//! Order, as in vLLM: log probabilities are of the raw logits; then bias, repetition, presence and frequency
//! penalties; temperature; `min_p`; `top_k`; `top_p` over what these left; the draw. Ties go to the lowest
//! id. Nothing sorts the vocabulary: a threshold is found through a histogram over the bits of the weights.
//! Refused: a row with a logit that is not a number or is positive infinity; it is reported as [`Poisoned`].

mod philox;
mod threshold;

pub use philox::uniform;
use threshold::{Cut, Survivors};

/// Most entries of a row's `logprobs`; what the OpenAI API allows.
pub const TOP_LOGPROBS_MAX: u32 = 20;

/// How the next token of one row is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleRow<'a> {
    /// 0 is greedy.
    pub temperature: f32,
    /// Nucleus: the smallest set of tokens with this much probability; 1 is off.
    pub top_p: f32,
    /// The most probable k tokens; 0 is off.
    pub top_k: u32,
    /// Tokens at least this share as probable as the most probable one; 0 is off.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once per occurrence in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: &'a [(u32, f32)],
    /// The sequence's prompt; read only for the repetition penalty.
    pub prompt: &'a [u32],
    /// The sequence's output so far; read only for the penalties.
    pub output: &'a [u32],
    /// Seed of the request.
    pub seed: u64,
    /// Position in the sequence of the token to choose.
    pub position: u32,
    /// Report log probabilities: of the chosen token and of this many most probable ones, at most
    /// [`TOP_LOGPROBS_MAX`].
    pub logprobs: Option<u32>,
}

impl SampleRow<'_> {
    /// The most probable token, nothing else.
    pub const GREEDY: SampleRow<'static> = SampleRow {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        logit_bias: &[],
        prompt: &[],
        output: &[],
        seed: 0,
        position: 0,
        logprobs: None,
    };

    /// Whether the token is simply that of the greatest raw logit.
    pub fn is_plain_argmax(&self) -> bool {
        self.temperature == 0.0 && !self.adjusts() && self.logprobs.is_none()
    }

    /// Whether the choice depends on the tokens so far.
    pub fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    pub(crate) fn adjusts(&self) -> bool {
        self.penalises() || !self.logit_bias.is_empty()
    }
}

/// The token chosen for a row.
#[derive(Debug, Clone, PartialEq)]
pub struct ChosenToken {
    /// Its id.
    pub token: u32,
    /// Log probabilities, if asked for.
    pub logprobs: Option<RowLogprobs>,
}

/// Natural logarithms of the softmax of the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct RowLogprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// Of the most probable tokens, most probable first; ties by id.
    pub top: Vec<(u32, f32)>,
}

/// The row's logits hold a value that is not a number or is infinite, or every token is excluded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the logits of this sequence are not numbers")]
pub struct Poisoned;

/// What became of a row.
pub type Sampled = Result<ChosenToken, Poisoned>;

/// Memory that sampling needs per thread; taken once.
#[derive(Debug)]
pub struct Scratch {
    adjusted: Vec<f32>,
    weights: Vec<f32>,
    occurrences: Vec<u32>,
    survivors: Survivors,
}

impl Scratch {
    /// Takes memory for rows of `vocabulary` logits.
    pub fn new(vocabulary: usize) -> Self {
        Self {
            adjusted: vec![0.0; vocabulary],
            weights: vec![0.0; vocabulary],
            occurrences: vec![0; vocabulary],
            survivors: Survivors::new(vocabulary),
        }
    }
}

/// Chooses the next token of a row.
///
/// # Errors
/// When the logits are not numbers.
///
/// # Panics
/// When the scratch was made for another vocabulary, or a token of the row is outside of it.
pub fn sample_row(logits: &[f32], row: &SampleRow<'_>, scratch: &mut Scratch) -> Sampled {
    assert_eq!(logits.len(), scratch.weights.len(), "scratch of another vocabulary");
    let (best, _) = greatest(logits).ok_or(Poisoned)?;
    let token = if row.temperature == 0.0 && !row.adjusts() {
        best
    } else {
        let Scratch { adjusted, weights, occurrences, survivors } = scratch;
        let adjusted = if row.adjusts() {
            adjusted.copy_from_slice(logits);
            adjust(adjusted, row, occurrences);
            &*adjusted
        } else {
            logits
        };
        let (best, maximum) = greatest(adjusted).ok_or(Poisoned)?;
        if row.temperature == 0.0 { best } else { draw(adjusted, maximum, row, weights, survivors) }
    };
    let logprobs = row.logprobs.map(|count| logprobs(logits, token, count.min(TOP_LOGPROBS_MAX)));
    Ok(ChosenToken { token, logprobs })
}

/// Position and value of the greatest element, the first of equals; `None` if any element is not a number or
/// the greatest is infinite.
pub fn greatest(logits: &[f32]) -> Option<(u32, f32)> {
    // Blocks keep the first pass free of indices, so that it compiles to vector maxima; comparing a block's
    // elements with themselves finds values that are not numbers.
    const BLOCK: usize = 512;
    let mut best_block = 0;
    let mut maximum = f32::NEG_INFINITY;
    for (index, block) in logits.chunks(BLOCK).enumerate() {
        let (block_maximum, numbers) = block_maximum(block);
        if !numbers {
            return None;
        }
        if block_maximum > maximum {
            maximum = block_maximum;
            best_block = index;
        }
    }
    if !maximum.is_finite() {
        return None;
    }
    let start = best_block * BLOCK;
    let offset = logits[start..].iter().position(|&logit| logit == maximum)?;
    Some(((start + offset) as u32, maximum))
}

fn block_maximum(block: &[f32]) -> (f32, bool) {
    const LANES: usize = 16;
    let mut maxima = [f32::NEG_INFINITY; LANES];
    let mut unequal = [0_u32; LANES];
    let (chunks, rest) = block.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            maxima[lane] = if chunk[lane] > maxima[lane] { chunk[lane] } else { maxima[lane] };
            unequal[lane] |= u32::from(chunk[lane].is_nan());
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        maxima[lane] = if value > maxima[lane] { value } else { maxima[lane] };
        unequal[lane] |= u32::from(value.is_nan());
    }
    let maximum = maxima.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    (maximum, unequal.iter().all(|&lane| lane == 0))
}

/// Applies bias and penalties. `occurrences` is all zero before and after.
fn adjust(logits: &mut [f32], row: &SampleRow<'_>, occurrences: &mut [u32]) {
    for &(token, bias) in row.logit_bias {
        logits[token as usize] += bias;
    }
    if !row.penalises() {
        return;
    }
    // The counts of output tokens come first; the high bit then marks tokens already handled, so that each
    // token of prompt and output is penalised once.
    const DONE: u32 = 1 << 31;
    for &token in row.output {
        occurrences[token as usize] += 1;
    }
    for &token in row.prompt.iter().chain(row.output) {
        let count = occurrences[token as usize];
        if count & DONE != 0 {
            continue;
        }
        occurrences[token as usize] = count | DONE;
        let logit = &mut logits[token as usize];
        *logit = if *logit > 0.0 { *logit / row.repetition_penalty } else { *logit * row.repetition_penalty };
        if count > 0 {
            *logit -= row.presence_penalty + row.frequency_penalty * count as f32;
        }
    }
    for &token in row.prompt.iter().chain(row.output) {
        occurrences[token as usize] = 0;
    }
}

/// Draws from the tempered distribution, cut by `min_p`, `top_k` and `top_p`.
fn draw(
    logits: &[f32],
    maximum: f32,
    row: &SampleRow<'_>,
    weights: &mut [f32],
    survivors: &mut Survivors,
) -> u32 {
    let inverse_temperature = 1.0 / row.temperature;
    // A temperature so low that its inverse overflows is greedy in all but name; the products would not be
    // numbers.
    let inverse_temperature = inverse_temperature.min(f32::MAX.sqrt());
    for (weight, &logit) in weights.iter_mut().zip(logits) {
        *weight = ((logit - maximum) * inverse_temperature).exp();
    }
    survivors.keep_all();
    if row.min_p > 0.0 {
        survivors.keep_at_least(row.min_p);
    }
    if row.top_k > 0 && (row.top_k as usize) < weights.len() {
        survivors.cut(weights, Cut::Count(row.top_k as usize));
    }
    if row.top_p < 1.0 {
        survivors.cut(weights, Cut::Mass(f64::from(row.top_p.max(0.0))));
    }
    survivors.draw(weights, uniform(row.seed, row.position))
}

fn logprobs(logits: &[f32], token: u32, count: u32) -> RowLogprobs {
    let (_, maximum) = greatest(logits).expect("checked before a token was chosen");
    let normaliser = f64::from(maximum) + exponential_sum(logits, maximum).ln();
    let of = |logit: f32| (f64::from(logit) - normaliser) as f32;
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(count as usize + 1);
    if count > 0 {
        for (id, &logit) in logits.iter().enumerate() {
            if top.len() == count as usize && top.last().is_some_and(|last| logit <= last.1) {
                continue;
            }
            let place = top.partition_point(|entry| entry.1 >= logit);
            top.insert(place, (id as u32, logit));
            top.truncate(count as usize);
        }
    }
    for entry in &mut top {
        entry.1 = of(entry.1);
    }
    RowLogprobs { chosen: of(logits[token as usize]), top }
}

/// Sum of `exp(logit - maximum)`, over fixed blocks so that it is exact enough and always the same.
fn exponential_sum(logits: &[f32], maximum: f32) -> f64 {
    logits
        .chunks(256)
        .map(|block| f64::from(block.iter().map(|&logit| (logit - maximum).exp()).sum::<f32>()))
        .sum()
}

#[cfg(test)]
mod tests;
