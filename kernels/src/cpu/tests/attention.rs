//! Attention over the paged cache, in each of its types, against its definition in f64.

use super::*;
use crate::cpu::arena::Rows;

/// Attention of one layer against its definition in f64, with grouped heads, a window and a long context.
#[test]
fn attention_is_right() {
    for isa in isas() {
        for kind in KINDS.into_iter().filter(|kind| kind.0 != Precision::Int8) {
            // Groups of 32 and of 13 heads do not fit into a tile.
            let shapes = [(6, 2, 8), (9, 3, 64), (4, 4, 24), (7, 1, 128), (64, 2, 8), (13, 1, 16)];
            for (heads, kv_heads, dim) in shapes {
                for (window, cap) in [(None, None), (Some(5), None), (Some(40), Some(1.5)), (None, Some(0.2))]
                {
                    check_attention(isa, kind, (heads, kv_heads, dim), (window, cap));
                }
            }
        }
    }
}

/// Scales of the tests' cache, if it has any. Not powers of two: these would change no code.
const SCALES: KvScales = KvScales { key: 0.003, value: 0.0017 };

fn check_attention(
    isa: Isa,
    (precision, dtype): (Precision, KvDtype),
    (heads, kv_heads, dim): (usize, usize, usize),
    (window, cap): (Option<u32>, Option<f32>),
) {
    use BufferKind::{Operand, Values};
    let (rows, width) = (75, (heads + 2 * kv_heads) * dim);
    let mut cpu = cpu(isa, precision);
    let kv = KvPlan { layers: 1, kv_heads, head_dim: dim, blocks: 64, dtype };
    let mut plan = plan(&[(width, Values), (heads * dim, Operand), (heads * dim, Values)], kv);
    plan.rope.inverse_frequencies.clear();
    plan.score_cap = cap;
    cpu.allocate(plan).unwrap();
    begin(&mut cpu, rows);
    let mut inputs = random(31, rows * width);
    for row in 0..rows {
        values(&mut cpu, Buffer(0), row).copy_from_slice(&inputs[row * width..][..width]);
    }
    let shape = AttentionShape {
        heads,
        kv_heads,
        head_dim: dim,
        scale: 0.4,
        sliding_window: window,
        kv_scales: SCALES,
    };
    cpu.rope_cache(0, Buffer(0), &shape, None);
    cpu.attention(0, Buffer(0), &shape, Buffer(1));
    let found = |row: usize, at: usize| match &cpu.arena.as_ref().unwrap().buffers[1] {
        Activation { stride, rows: Rows::F32(rows), .. } => rows[row * stride + at],
        Activation { stride, rows: Rows::Bf16(rows), .. } => lanes::bf16_value(rows[row * stride + at]),
        Activation { stride, rows: Rows::F16 { halves, scales }, .. } => {
            half::f16::from_bits(halves[row * stride + at]).to_f32() * scales[row]
        }
        _ => unreachable!("no int8 here"),
    };
    // Keys and values as the cache holds them.
    if dtype == KvDtype::Fp8E4m3 {
        for row in inputs.chunks_exact_mut(width) {
            let (keys, values) = row[heads * dim..].split_at_mut(kv_heads * dim);
            for (part, scale) in [(keys, SCALES.key), (values, SCALES.value)] {
                part.iter_mut()
                    .for_each(|value| *value = e4m3::decode(e4m3::encode(*value * (1.0 / scale))) * scale);
            }
        }
    }
    let part = |row: usize, head: usize| &inputs[row * width + head * dim..][..dim];
    for row in 0..rows {
        let first = window.map_or(0, |window| (row + 1).saturating_sub(window as usize));
        for head in 0..heads {
            let key_head = heads + head / (heads / kv_heads);
            let weights: Vec<f64> = (first..=row)
                .map(|at| {
                    let pairs = part(row, head).iter().zip(part(at, key_head));
                    let score = 0.4 * pairs.map(|(&q, &k)| f64::from(q) * f64::from(k)).sum::<f64>();
                    cap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh()).exp()
                })
                .collect();
            let total: f64 = weights.iter().sum();
            for element in 0..dim {
                let value = |at: usize| f64::from(part(first + at, key_head + kv_heads)[element]);
                let sum: f64 = weights.iter().enumerate().map(|(at, weight)| weight * value(at)).sum();
                let error = (f64::from(found(row, head * dim + element)) - sum / total).abs();
                let bound = if precision == Precision::F32 { 2e-6 } else { 3e-2 };
                assert!(error <= bound, "{isa} {precision:?} {dtype:?} row {row} head {head}: error {error}");
            }
        }
    }
}
