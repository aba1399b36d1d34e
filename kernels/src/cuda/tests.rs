//! Every kernel on a device against plain arithmetic in f64, over poisoned outputs, and byte for byte against itself
//! at other batch sizes. Without a device each test says that it was skipped.

mod attention;
mod sampling;

use attention::check_attention;
use half::bf16;
use sampling::{sample, sampling_device};

use super::*;
use crate::e4m3;
use crate::ops::{BufferKind, BufferPlan, KvDtype, KvScales, RopePlan};
use crate::sampling::{Choice, Scratch, sample_row, uniform};
use crate::tensor::DType;

/// A device, or none with a word on it. Where a device must be there, its absence fails the test.
fn open(portable: bool) -> Option<Cuda> {
    match Cuda::new(CudaOptions { portable, ..CudaOptions::new(0) }) {
        Ok(cuda) => Some(cuda),
        Err(error) => {
            assert!(std::env::var_os("MILLRACE_REQUIRE_CUDA").is_none(), "a device is required: {error}");
            eprintln!("SKIPPED: {error}");
            None
        }
    }
}

/// Reproducible numbers in `[-1, 1)`, as bf16 holds them.
fn random(seed: u64, len: usize) -> Vec<f32> {
    let number = |index: usize| uniform(seed, index as u32) as f32 * 2.0 - 1.0;
    (0..len).map(|index| bf16::from_f32(number(index)).to_f32()).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect()
}

fn matrix(cuda: &mut Cuda, rows: usize, columns: usize, values: &[f32]) -> Matrix {
    let raw = bytes(values);
    cuda.matrix(&[HostTensor::new(DType::F32, &[rows, columns], &raw).unwrap()]).unwrap()
}

fn vector(cuda: &mut Cuda, values: &[f32]) -> Vector {
    let raw = bytes(values);
    cuda.vector(&[HostTensor::new(DType::F32, &[values.len()], &raw).unwrap()]).unwrap()
}

const NO_KV: KvPlan = KvPlan { layers: 1, kv_heads: 1, head_dim: 64, blocks: 256, dtype: KvDtype::Operand };

fn plan(widths: &[(usize, BufferKind)], kv: KvPlan, heads: usize, rows_max: usize) -> ArenaPlan {
    ArenaPlan {
        rows_max,
        logits_rows_max: rows_max,
        positions_max: 8192,
        vocabulary: 97,
        heads,
        buffers: widths.iter().map(|&(width, kind)| BufferPlan { width, kind }).collect(),
        kv,
        rope: RopePlan {
            inverse_frequencies: (0..kv.head_dim / 2).map(|i| 0.5_f32.powi(i as i32 % 12)).collect(),
            amplitude: 1.0,
        },
    }
}

/// Starts a step of one sequence.
fn begin(cuda: &mut Cuda, rows: usize) {
    let tokens: Vec<u32> = (0..rows as u32).map(|row| row % 97).collect();
    let tables: Vec<u32> = (0..512).map(|block| block % NO_KV.blocks as u32).collect();
    let span = Span { first_row: 0, rows: rows as u32, context: rows as u32, table: 0 };
    let batch = Batch { tokens: &tokens, spans: &[span], block_tables: &tables, logits_rows: &[] };
    cuda.begin(&batch).unwrap();
}

/// Writes rows into a buffer, as what the buffer holds.
fn put(cuda: &Cuda, buffer: Buffer, values: &[f32]) {
    let activation = &cuda.arena().buffers[buffer.0];
    let element = activation.element_bytes();
    for (row, values) in values.chunks_exact(activation.width).enumerate() {
        let raw = if element == 4 { bytes(values) } else { bf16_bytes(values) };
        let at = activation.rows.pointer + (row * activation.stride * element) as u64;
        cuda.arena().write(&cuda.device, at, &raw).unwrap();
    }
}

/// Runs what was recorded and reads rows of a buffer.
fn take(cuda: &mut Cuda, buffer: Buffer, rows: usize) -> Vec<f32> {
    cuda.flush().unwrap();
    let activation = &cuda.arena().buffers[buffer.0];
    let (stride, element) = (activation.stride, activation.element_bytes());
    let mut raw = vec![0; rows * stride * element];
    cuda.arena().download(activation.rows.pointer, &mut raw).unwrap();
    let values: Vec<f32> = if element == 4 {
        raw.chunks_exact(4).map(|raw| f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]])).collect()
    } else {
        raw.chunks_exact(2).map(|raw| bf16::from_le_bytes([raw[0], raw[1]]).to_f32()).collect()
    };
    values.chunks_exact(stride).flat_map(|row| row[..activation.width].to_vec()).collect()
}

/// `|found - expected| / |expected|`, as norms; not a number anywhere gives infinity.
fn distance(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let difference: f64 = found.iter().zip(expected).map(|(&f, e)| (f64::from(f) - e).powi(2)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    let distance = (difference / norm.max(f64::MIN_POSITIVE)).sqrt();
    if distance.is_nan() { f64::INFINITY } else { distance }
}

/// Products of one shape at many batch sizes. Returns the bits of the values' product at the largest batch.
fn check_products(cuda: &mut Cuda, (features, columns): (usize, usize), batches: &[usize]) -> Vec<u32> {
    use BufferKind::{Operand, Values};
    let most = *batches.iter().max().unwrap();
    let (x, out, sums, gated) = (Buffer(0), Buffer(1), Buffer(2), Buffer(3));
    let widths = [(columns, Operand), (features, Values), (features, Values), (features, Operand)];
    let weights = random(1, features * columns);
    let ups = random(4, features * columns);
    let w = matrix(cuda, features, columns, &weights);
    let (raw_gate, raw_up) = (bytes(&weights), bytes(&ups));
    let tensor = |raw| HostTensor::new(DType::F32, &[features, columns], raw).unwrap();
    let gate_up = cuda.gated_matrix(&tensor(&raw_gate), &tensor(&raw_up)).unwrap();
    let bias = random(3, features);
    let b = vector(cuda, &bias);
    cuda.allocate(plan(&widths, NO_KV, 1, most)).unwrap();
    let (input, before) = (random(2, most * columns), random(5, most * features));
    let dot = |row: usize, feature: usize, weights: &[f32]| -> f64 {
        let (row, feature) = (&input[row * columns..][..columns], &weights[feature * columns..][..columns]);
        row.iter().zip(feature).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let mut known: [Vec<u32>; 3] = Default::default();
    let mut batches = batches.to_vec();
    batches.sort_unstable_by(|a, b| b.cmp(a));
    for &rows in &batches {
        begin(cuda, rows);
        put(cuda, x, &input);
        put(cuda, out, &vec![f32::NAN; most * features]);
        put(cuda, sums, &before);
        put(cuda, gated, &vec![f32::NAN; most * features]);
        cuda.linear(&w, Some(&b), x, out);
        cuda.linear_add(&w, None, x, sums);
        cuda.linear_silu_mul(&gate_up, x, gated);
        let found = [take(cuda, out, rows), take(cuda, sums, rows), take(cuda, gated, rows)];
        if rows == most {
            // A few rows in full: all features, all tiles of the batch.
            let some: Vec<usize> = (0..rows).step_by((rows / 7).max(1)).collect();
            let of = |f: &dyn Fn(usize, usize) -> f64| -> Vec<f64> {
                some.iter().flat_map(|&r| (0..features).map(move |j| (r, j))).map(|(r, j)| f(r, j)).collect()
            };
            let picked = |all: &[f32]| -> Vec<f32> {
                some.iter().flat_map(|&row| all[row * features..][..features].to_vec()).collect()
            };
            let expected = of(&|r, j| dot(r, j, &weights) + f64::from(bias[j]));
            let error = distance(&picked(&found[0]), &expected);
            assert!(error < 1e-5, "values {rows}x{features}x{columns}: {error}");
            let expected = of(&|r, j| f64::from(before[r * features + j]) + dot(r, j, &weights));
            let error = distance(&picked(&found[1]), &expected);
            assert!(error < 1e-5, "add {rows}x{features}x{columns}: {error}");
            let silu = |x: f64| x / (1.0 + (-x).exp());
            let expected = of(&|r, j| silu(dot(r, j, &weights)) * dot(r, j, &ups));
            let error = distance(&picked(&found[2]), &expected);
            assert!(error < 4e-3, "silu_mul {rows}x{features}x{columns}: {error}");
        }
        for (kind, (found, known)) in found.iter().zip(&mut known).enumerate() {
            assert!(
                found.iter().all(|value| value.is_finite()),
                "product {kind} of {rows} rows is not written"
            );
            let bits: Vec<u32> = found.iter().map(|value| value.to_bits()).collect();
            if known.is_empty() {
                *known = bits;
            } else {
                let differ = bits.iter().zip(known.iter()).filter(|(a, b)| a != b).count();
                let sizes = format!("{features}x{columns}, {rows} rows");
                assert_eq!(differ, 0, "product {kind}, {sizes}: bytes depend on the batch");
            }
        }
    }
    known[0].clone()
}

const SHAPES: [(usize, usize); 7] =
    [(64, 64), (48, 104), (576, 576), (1024, 2048), (4096, 1024), (1024, 3072), (4096, 1536)];

#[test]
fn products_are_right_at_any_batch_size() {
    for shape in SHAPES {
        let mut bits = Vec::new();
        for portable in [false, true] {
            let Some(mut cuda) = open(portable) else { return };
            let few = [1, 2, 7, 8, 9, 16, 17, 33, 64, 65, 127, 128, 200, 256, 257, 300, 700];
            let many = [1, 64, 300, 5000];
            bits.push(check_products(&mut cuda, shape, &few));
            if shape.0 >= 1024 && !portable {
                let Some(mut cuda) = open(portable) else { return };
                check_products(&mut cuda, shape, &many);
            }
        }
        let differ = bits[0].iter().zip(&bits[1]).filter(|(a, b)| a != b).count();
        println!("{shape:?}: {differ} of {} values differ between wgmma and mma", bits[0].len());
    }
}

/// What a sanitizer can run through: every kernel, at small sizes.
#[test]
fn small_sizes_of_every_kernel() {
    for portable in [false, true] {
        let Some(mut cuda) = open(portable) else { return };
        check_products(&mut cuda, (72, 1032), &[1, 9, 20, 40, 70, 130, 200]);
    }
    let shape = AttentionShape {
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        scale: 0.125,
        sliding_window: None,
        kv_scales: KvScales::ONE,
    };
    check_attention(shape, 40);
    let Some(mut cuda) = sampling_device(9001) else { return };
    let (logits, output) = (random(3, 9001 * 3), [1, 2, 3, 1]);
    let hot = SampleRow { temperature: 1.0, logprobs: Some(2), ..SampleRow::GREEDY };
    let rows = [
        SampleRow { top_k: 5, top_p: 0.9, min_p: 0.01, ..hot },
        SampleRow { frequency_penalty: 1.0, output: &output, ..hot },
        SampleRow::GREEDY,
    ];
    assert!(sample(&mut cuda, &logits, &rows).iter().all(Result::is_ok));
}

#[test]
fn norms_and_embeddings_are_right() {
    use BufferKind::{Operand, Values};
    for width in [64, 100, 576, 1024, 4096] {
        let Some(mut cuda) = open(false) else { return };
        let (table, weight) = (random(1, 97 * width), random(2, width));
        let (t, w) = (matrix(&mut cuda, 97, width, &table), vector(&mut cuda, &weight));
        let (x, y) = (Buffer(0), Buffer(1));
        cuda.allocate(plan(&[(width, Values), (width, Operand)], NO_KV, 1, 130)).unwrap();
        for rows in [1, 130] {
            begin(&mut cuda, rows);
            put(&cuda, x, &vec![f32::NAN; rows * width]);
            put(&cuda, y, &vec![f32::NAN; rows * width]);
            cuda.embed(&t, x);
            cuda.rms_norm(x, &w, 1e-6, y);
            let (embedded, normed) = (take(&mut cuda, x, rows), take(&mut cuda, y, rows));
            for row in 0..rows {
                let source = &table[row % 97 * width..][..width];
                assert_eq!(&embedded[row * width..][..width], source, "row {row} of {width}");
                let square: f64 = source.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / width as f64;
                let of = |i: usize| f64::from(source[i]) / (square + 1e-6).sqrt() * f64::from(weight[i]);
                let error =
                    distance(&normed[row * width..][..width], &(0..width).map(of).collect::<Vec<_>>());
                assert!(error < 4e-3, "row {row} of {width}: {error}");
            }
        }
    }
}
