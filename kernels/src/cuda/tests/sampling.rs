//! Tokens and log probabilities from the device against those of the host.

use super::*;
use crate::sampling::Sampled;

/// Samples given logits on the device.
pub(super) fn sample(cuda: &mut Cuda, logits: &[f32], rows: &[SampleRow<'_>]) -> Vec<Sampled> {
    queue(cuda, logits, rows);
    let mut out = Vec::new();
    cuda.collect(&mut out).unwrap();
    out
}

/// Queues a step that samples given logits.
fn queue(cuda: &mut Cuda, logits: &[f32], rows: &[SampleRow<'_>]) {
    let count = rows.len();
    let tokens = vec![0; count];
    let tables = vec![0; count];
    let spans: Vec<RowSpan> =
        (0..count as u32).map(|row| RowSpan { first_row: row, rows: 1, context: 1, table: row }).collect();
    let logits_rows: Vec<u32> = (0..count as u32).collect();
    let batch = Batch {
        tokens: &tokens,
        feeds: &[],
        spans: &spans,
        block_tables: &tables,
        logits_rows: &logits_rows,
    };
    cuda.begin(&batch).unwrap();
    let (arena, vocabulary) = (cuda.arena(), cuda.arena().plan.vocabulary);
    for (row, values) in logits.chunks_exact(vocabulary).enumerate() {
        let at = arena.logits + (row * arena.logits_stride * 4) as u64;
        arena.write(&cuda.device, at, &bytes(values)).unwrap();
    }
    cuda.queue_sampled(rows).unwrap();
}

pub(super) fn sampling_device(vocabulary: usize) -> Option<Cuda> {
    let mut cuda = open(KernelSet::Own)?;
    let widths = [(64, BufferKind::Values)];
    cuda.allocate(ArenaPlan { vocabulary, ..plan(&widths, NO_KV, 1, 64) }).unwrap();
    Some(cuda)
}

#[test]
fn tokens_are_those_of_the_host() {
    let vocabulary = 50_001;
    let Some(mut cuda) = sampling_device(vocabulary) else { return };
    let prompt: Vec<u32> = (0..500).map(|i| i * 97 % 3000).collect();
    let output: Vec<u32> = (0..300).map(|i| i * i % 1000).collect();
    let bias = [(17, 3.0), (49_999, f32::NEG_INFINITY), (0, -1.0)];
    let base = SampleRow { prompt: &prompt, output: &output, ..SampleRow::GREEDY };
    let hot = SampleRow { temperature: 0.7, ..base };
    let kinds = [
        base,
        hot,
        SampleRow { top_k: 40, ..hot },
        SampleRow { top_p: 0.9, ..hot },
        SampleRow { min_p: 0.2, ..hot },
        SampleRow { top_k: 300, top_p: 0.5, min_p: 0.01, logprobs: Some(5), ..hot },
        SampleRow { repetition_penalty: 1.3, presence_penalty: 0.4, frequency_penalty: 0.2, ..hot },
        SampleRow { logit_bias: &bias, logprobs: Some(20), ..hot },
        SampleRow { logit_bias: &bias, frequency_penalty: 1.0, logprobs: Some(0), ..base },
        SampleRow { temperature: 1e-30, ..base },
    ];
    let (mut scratch, mut differ, mut total) = (Scratch::new(vocabulary), 0, 0);
    for round in 0..12_u64 {
        let scale = [1.0, 4.0, 12.0][round as usize % 3];
        let logits: Vec<f32> = random(round, vocabulary * kinds.len()).iter().map(|v| v * scale).collect();
        let rows: Vec<SampleRow<'_>> = kinds
            .iter()
            .map(|row| SampleRow { seed: round * 77, position: 5 + round as u32, ..*row })
            .collect();
        let found = sample(&mut cuda, &logits, &rows);
        for (index, (row, found)) in rows.iter().zip(&found).enumerate() {
            let logits = &logits[index * vocabulary..][..vocabulary];
            let (found, expected) = (found.as_ref().unwrap(), sample_row(logits, row, &mut scratch).unwrap());
            total += 1;
            differ += usize::from(found.token != expected.token);
            if found.token == expected.token {
                check_logprobs(found, &expected);
            }
            assert!(row.temperature != 0.0 || found.token == expected.token, "greedy, kind {index}");
        }
    }
    // Sums are rounded differently: a draw at the border between two tokens may fall to either side.
    assert!(differ * 100 <= total, "{differ} of {total} tokens differ");
}

fn check_logprobs(found: &ChosenToken, expected: &ChosenToken) {
    let (Some(found), Some(expected)) = (&found.logprobs, &expected.logprobs) else {
        assert_eq!(found.logprobs.is_some(), expected.logprobs.is_some());
        return;
    };
    assert!((found.chosen - expected.chosen).abs() < 1e-3, "{} for {}", found.chosen, expected.chosen);
    assert_eq!(found.top.len(), expected.top.len());
    for (found, expected) in found.top.iter().zip(&expected.top) {
        assert!(found.0 == expected.0 && (found.1 - expected.1).abs() < 1e-3, "{found:?} for {expected:?}");
    }
}

#[test]
fn a_row_is_fed_with_a_choice_of_the_step_before() {
    let Some(mut cuda) = open(KernelSet::Own) else { return };
    let table = random(1, 97 * 64);
    let matrix = matrix(&mut cuda, 97, 64, &table);
    cuda.allocate(plan(&[(64, BufferKind::Values)], NO_KV, 1, 64)).unwrap();
    let mut logits = vec![0.0; 97 * 3];
    for (row, token) in [41, 42, 43].into_iter().enumerate() {
        logits[row * 97 + token] = 9.0;
    }
    queue(&mut cuda, &logits, &[SampleRow { logprobs: Some(1), ..SampleRow::GREEDY }; 3]);
    let spans = [RowSpan { first_row: 0, rows: 3, context: 3, table: 0 }];
    let feeds = [Feed { row: 0, choice: 2 }, Feed { row: 2, choice: 0 }];
    let batch =
        Batch { tokens: &[0, 7, 0], feeds: &feeds, spans: &spans, block_tables: &[0], logits_rows: &[] };
    cuda.begin(&batch).unwrap();
    cuda.embed(&matrix, Buffer(0));
    cuda.queue_sampled(&[]).unwrap();
    let (mut first, mut second) = (Vec::new(), Vec::new());
    assert!(cuda.collect(&mut first).unwrap().is_some() && cuda.collect(&mut second).unwrap().is_some());
    let tokens: Vec<u32> = first.iter().map(|choice| choice.as_ref().unwrap().token).collect();
    assert_eq!((tokens, second), (vec![41, 42, 43], Vec::new()));
    let embedded = take(&mut cuda, Buffer(0), 3);
    for (row, token) in [43, 7, 41].into_iter().enumerate() {
        assert_eq!(embedded[row * 64..][..64], table[token * 64..][..64], "row {row}");
    }
}

#[test]
fn poisoned_rows_harm_no_other() {
    let vocabulary = 9001;
    let Some(mut cuda) = sampling_device(vocabulary) else { return };
    let mut logits = random(3, vocabulary * 4);
    logits[vocabulary + 8999] = f32::NAN;
    logits[2 * vocabulary + 4] = f32::INFINITY;
    let rows = [SampleRow { temperature: 1.0, seed: 1, ..SampleRow::GREEDY }; 4];
    let found = sample(&mut cuda, &logits, &rows);
    let alone = sample(&mut cuda, &logits[..vocabulary], &rows[..1]);
    assert_eq!((&found[1], &found[2]), (&Err(crate::sampling::Poisoned), &Err(crate::sampling::Poisoned)));
    assert_eq!(found[0], alone[0]);
    assert!(found[3].is_ok());
}
