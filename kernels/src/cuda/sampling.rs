//! Sampling's parameters and results, as `sample.cu` reads and writes them.
//!
//! Bias and penalties of a row become one list of tokens, each once. Pure.

use super::plan::PARAMETER_WORDS;
use crate::sampling::{ChosenToken, Poisoned, RowLogprobs, SampleRow, Sampled, TOP_LOGPROBS_MAX};

/// Tokens per block where a row is shared out.
pub const PART_TOKENS: usize = 4096;
/// Bytes of a result: token, poisoned.
pub const RESULT_BYTES: usize = 8;
/// Bytes of a row's log probabilities.
pub const LOGPROBS_BYTES: usize = LOGPROBS_WORDS * 4;
/// chosen, maximum, normaliser (two words), tokens, values.
const LOGPROBS_WORDS: usize = 4 + 2 * TOP_LOGPROBS_MAX as usize;
/// Bytes of an adjustment.
pub const ADJUSTMENT_BYTES: usize = ADJUSTMENT_WORDS * 4;
/// token, bias, count, penalised, raw.
const ADJUSTMENT_WORDS: usize = 5;

/// A step's adjustments in the making.
#[derive(Debug)]
pub struct Adjustments {
    /// Where each token of the row at hand stands in the row's list, plus one; 0 is nowhere. Zero between rows.
    places: Vec<u32>,
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    token: u32,
    bias: f32,
    count: u32,
    penalised: bool,
}

impl Adjustments {
    /// Takes scratch for a vocabulary.
    pub fn new(vocabulary: usize) -> Self {
        Self { places: vec![0; vocabulary], entries: Vec::new() }
    }

    fn entry(&mut self, token: u32) -> &mut Entry {
        let place = &mut self.places[token as usize];
        if *place == 0 {
            self.entries.push(Entry { token, bias: 0.0, count: 0, penalised: false });
            *place = self.entries.len() as u32;
        }
        &mut self.entries[*place as usize - 1]
    }

    /// Writes a row's adjustments from this place on; returns their number, or `None` when there is no room.
    pub fn write(&mut self, row: &SampleRow<'_>, first: usize, into: &mut [u32]) -> Option<usize> {
        self.entries.clear();
        for &(token, bias) in row.logit_bias {
            self.entry(token).bias += bias;
        }
        if row.penalises() {
            for &token in row.prompt {
                self.entry(token).penalised = true;
            }
            for &token in row.output {
                let entry = self.entry(token);
                entry.penalised = true;
                entry.count += 1;
            }
        }
        for entry in &self.entries {
            self.places[entry.token as usize] = 0;
        }
        let words =
            into.get_mut(first * ADJUSTMENT_WORDS..(first + self.entries.len()) * ADJUSTMENT_WORDS)?;
        for (entry, words) in self.entries.iter().zip(words.chunks_exact_mut(ADJUSTMENT_WORDS)) {
            words.copy_from_slice(&[
                entry.token,
                entry.bias.to_bits(),
                entry.count,
                u32::from(entry.penalised),
                0,
            ]);
        }
        Some(self.entries.len())
    }
}

/// Whether a row needs more than a maximum and a draw.
pub fn needs_all_kernels(row: &SampleRow<'_>) -> bool {
    let cuts = row.min_p > 0.0 || row.top_k > 0 || row.top_p < 1.0;
    row.adjusts() || row.logprobs.is_some() || (cuts && row.temperature != 0.0)
}

/// Writes a row's parameters.
pub fn write_parameters(row: &SampleRow<'_>, (first, count): (usize, usize), into: &mut [u32]) {
    let words: [u32; PARAMETER_WORDS] = [
        row.temperature.to_bits(),
        row.top_p.to_bits(),
        row.min_p.to_bits(),
        row.repetition_penalty.to_bits(),
        row.presence_penalty.to_bits(),
        row.frequency_penalty.to_bits(),
        row.top_k,
        row.logprobs.map_or(0, |count| count.min(TOP_LOGPROBS_MAX) + 1),
        row.seed as u32,
        (row.seed >> 32) as u32,
        row.position,
        first as u32,
        count as u32,
        0,
        0,
        0,
    ];
    into.copy_from_slice(&words);
}

/// Reads a row's result, with the log probabilities that it wants, out of what came back.
pub fn read_result(wanted: Option<u32>, (results, logprobs): (&[u32], &[u32]), index: usize) -> Sampled {
    let result = &results[index * 2..][..2];
    if result[1] != 0 {
        return Err(Poisoned);
    }
    let logprobs = wanted.map(|count| {
        let words = &logprobs[index * LOGPROBS_WORDS..][..LOGPROBS_WORDS];
        let (tokens, values) = words[4..].split_at(TOP_LOGPROBS_MAX as usize);
        let top = tokens.iter().zip(values).take(count.min(TOP_LOGPROBS_MAX) as usize);
        RowLogprobs {
            chosen: f32::from_bits(words[0]),
            top: top.map(|(&token, &value)| (token, f32::from_bits(value))).collect(),
        }
    });
    Ok(ChosenToken { token: result[0], logprobs })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bias_and_penalties_become_one_entry_per_token() {
        let row = SampleRow {
            presence_penalty: 1.0,
            logit_bias: &[(7, 0.5), (9, -1.0)],
            prompt: &[1, 7, 1],
            output: &[2, 7, 2],
            ..SampleRow::GREEDY
        };
        let mut words = vec![0; 8 * ADJUSTMENT_WORDS];
        let mut adjustments = Adjustments::new(10);
        for first in [0, 3] {
            assert_eq!(adjustments.write(&row, first, &mut words), Some(4));
            let entry = |index: usize| words[(first + index) * ADJUSTMENT_WORDS..][..4].to_vec();
            assert_eq!(entry(0), [7, 0.5_f32.to_bits(), 1, 1]);
            assert_eq!(entry(1), [9, (-1.0_f32).to_bits(), 0, 0]);
            assert_eq!(entry(2), [1, 0, 0, 1]);
            assert_eq!(entry(3), [2, 0, 2, 1]);
        }
        assert_eq!(adjustments.write(&row, 5, &mut words), None, "there is room for three");
    }
}
