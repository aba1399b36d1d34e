//! Sampling against a slow form that sorts everything, and its edge cases.

use proptest::prelude::*;

use super::*;

/// The survivors' probabilities by sorting, as the definition reads.
fn slow(logits: &[f32], row: &SampleRow<'_>) -> Vec<f64> {
    let maximum = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> =
        logits.iter().map(|&logit| ((logit - maximum) * (1.0 / row.temperature)).exp()).collect();
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
    order.retain(|&id| weights[id] >= row.min_p);
    if row.top_k > 0 {
        order.truncate(row.top_k as usize);
    }
    if row.top_p < 1.0 {
        let total: f64 = order.iter().map(|&id| f64::from(weights[id])).sum();
        let mut mass = 0.0;
        let keep = order.iter().take_while(|&&id| {
            let more = mass < f64::from(row.top_p) * total;
            mass += f64::from(weights[id]);
            more
        });
        let keep = keep.count().max(1);
        order.truncate(keep);
    }
    let total: f64 = order.iter().map(|&id| f64::from(weights[id])).sum();
    let mut probabilities = vec![0.0; logits.len()];
    for &id in &order {
        probabilities[id] = f64::from(weights[id]) / total;
    }
    probabilities
}

fn sampled(logits: &[f32], row: &SampleRow<'_>) -> u32 {
    sample_row(logits, row, &mut Scratch::new(logits.len())).unwrap().token
}

proptest! {
    /// The draw is the inverse of the distribution function, over exactly the survivors.
    #[test]
    fn draws_as_the_definition(
        logits in prop::collection::vec(-12.0_f32..12.0, 1..700),
        temperature in 0.2_f32..3.0,
        top_k in 0_u32..40,
        top_p in prop_oneof![Just(1.0_f32), 0.05_f32..1.0],
        min_p in prop_oneof![Just(0.0_f32), 0.0_f32..0.5],
        seed in any::<u64>(),
    ) {
        // A few equal logits, so that ties at the cut occur.
        let logits: Vec<f32> = logits.iter().map(|logit| (logit * 2.0).round() / 2.0).collect();
        let row = SampleRow { temperature, top_k, top_p, min_p, seed, ..SampleRow::GREEDY };
        let probabilities = slow(&logits, &row);
        let token = sampled(&logits, &row) as usize;
        prop_assert!(probabilities[token] > 0.0, "token {token} was cut");
        let below: f64 = probabilities[..token].iter().sum();
        let share = uniform(seed, 0);
        prop_assert!(below <= share + 1e-6 && share <= below + probabilities[token] + 1e-6);
    }

    /// The greatest logit, the first of equals.
    #[test]
    fn greedy_is_the_first_greatest(logits in prop::collection::vec(-4_i32..4, 1..2000)) {
        let logits: Vec<f32> = logits.iter().map(|&logit| logit as f32).collect();
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let first = logits.iter().position(|&logit| logit == best).unwrap();
        prop_assert_eq!(sampled(&logits, &SampleRow::GREEDY) as usize, first);
    }
}

#[test]
fn frequencies_follow_the_probabilities() {
    let logits = [0.0_f32, 1.0, 2.0, -1.0];
    let mut counts = [0_u32; 4];
    for position in 0..20_000 {
        let row = SampleRow { temperature: 1.0, seed: 42, position, ..SampleRow::GREEDY };
        counts[sampled(&logits, &row) as usize] += 1;
    }
    let expected = slow(&logits, &SampleRow { temperature: 1.0, ..SampleRow::GREEDY });
    for (count, expected) in counts.iter().zip(expected) {
        let share = f64::from(*count) / 20_000.0;
        assert!((share - expected).abs() < 0.015, "{share} against {expected}");
    }
}

#[test]
fn poisoned_rows_are_reported() {
    for position in [0, 3, 16, 511, 512, 999] {
        for value in [f32::NAN, -f32::NAN, f32::INFINITY] {
            let mut logits = vec![1.0_f32; 1000];
            logits[position] = value;
            let mut scratch = Scratch::new(1000);
            assert_eq!(sample_row(&logits, &SampleRow::GREEDY, &mut scratch), Err(Poisoned));
        }
    }
    let mut scratch = Scratch::new(3);
    assert_eq!(sample_row(&[f32::NEG_INFINITY; 3], &SampleRow::GREEDY, &mut scratch), Err(Poisoned));
}

#[test]
fn penalties_and_bias() {
    let logits = [2.0_f32, 1.9, -1.0, 0.0];
    let greedy = SampleRow::GREEDY;
    assert_eq!(sampled(&logits, &SampleRow { repetition_penalty: 1.5, prompt: &[0, 0], ..greedy }), 1);
    assert_eq!(sampled(&logits, &SampleRow { presence_penalty: 0.2, output: &[0], ..greedy }), 1);
    assert_eq!(sampled(&logits, &SampleRow { presence_penalty: 0.2, prompt: &[0], ..greedy }), 0);
    assert_eq!(sampled(&logits, &SampleRow { frequency_penalty: 0.06, output: &[0], ..greedy }), 0);
    assert_eq!(sampled(&logits, &SampleRow { frequency_penalty: 0.06, output: &[0, 0], ..greedy }), 1);
    assert_eq!(sampled(&logits, &SampleRow { logit_bias: &[(2, 100.0)], ..greedy }), 2);
    let mut scratch = Scratch::new(4);
    let row = SampleRow { repetition_penalty: 1.5, prompt: &[0, 1], output: &[2, 2], ..greedy };
    sample_row(&logits, &row, &mut scratch).unwrap();
    assert!(scratch.occurrences.iter().all(|&count| count == 0), "scratch is left clean");
}

#[test]
fn logprobs_are_of_the_raw_logits() {
    let logits = [2.0_f32, 1.0, 2.0, -3.0, 0.5];
    let row = SampleRow { logprobs: Some(3), logit_bias: &[(4, 50.0)], ..SampleRow::GREEDY };
    let choice = sample_row(&logits, &row, &mut Scratch::new(5)).unwrap();
    assert_eq!(choice.token, 4);
    let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
    let expected = |logit: f32| (f64::from(logit).exp() / total).ln() as f32;
    let logprobs = choice.logprobs.unwrap();
    assert!((logprobs.chosen - expected(0.5)).abs() < 1e-6);
    assert_eq!(logprobs.top.iter().map(|entry| entry.0).collect::<Vec<_>>(), [0, 2, 1]);
    assert!((logprobs.top[2].1 - expected(1.0)).abs() < 1e-6);
    let none = sample_row(&logits, &SampleRow { logprobs: Some(0), ..row }, &mut Scratch::new(5));
    assert!(none.unwrap().logprobs.unwrap().top.is_empty());
}

#[test]
fn tiny_temperatures_do_not_overflow() {
    let row = SampleRow { temperature: f32::MIN_POSITIVE / 4.0, ..SampleRow::GREEDY };
    assert_eq!(sampled(&[0.0, 3.0, 1.0], &row), 1);
}
