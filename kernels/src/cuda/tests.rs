//! Every kernel on a device against plain arithmetic in f64, over poisoned outputs, and byte for byte against itself
//! at other batch sizes. Without a device each test says that it was skipped.

mod attention;
mod products;
mod rows;
mod sampling;

use attention::{check_attention, check_attention_of_product, check_capped_attention};
use half::bf16;
use products::{check_normed_products, check_products};
use sampling::{sample, sampling_device};

use super::*;
use crate::e4m3;
use crate::ops::{
    ArenaPlan, AttentionShape, Buffer, BufferKind, BufferPlan, HeadWork, KvDtype, KvPlan, KvScales, Ops,
    QkNorm, RopePlan,
};
use crate::sampling::{ChosenToken, Scratch, sample_row, uniform};
use crate::tensor::{DType, HostTensor};

/// A device, or none with a word on it. Where a device must be there, its absence fails the test.
fn open(kernels: KernelSet) -> Option<Cuda> {
    match Cuda::new(CudaOptions { kernels, ..CudaOptions::new(0) }) {
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
        score_cap: None,
        logits_cap: None,
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
    let span = RowSpan { first_row: 0, rows: rows as u32, context: rows as u32, table: 0 };
    let batch =
        Batch { tokens: &tokens, feeds: &[], spans: &[span], block_tables: &tables, logits_rows: &[] };
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

/// What a sanitizer can run through: every kernel, at small sizes.
#[test]
fn small_sizes_of_every_kernel() {
    for set in [KernelSet::Own, KernelSet::Portable] {
        let Some(mut cuda) = open(set) else { return };
        check_products(&mut cuda, (72, 1032), &[1, 9, 20, 40, 70, 130, 200]);
        let Some(mut cuda) = open(set) else { return };
        check_normed_products(&mut cuda, (136, 1032), &[1, 9, 20, 40, 70, 130, 200]);
    }
    let shape = AttentionShape {
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        scale: 0.125,
        sliding_window: None,
        kv_scales: KvScales::ONE,
    };
    // As many heads as it takes for 40 decodes to be walked in runs.
    check_attention(AttentionShape { heads: 16, kv_heads: 8, ..shape }, 40);
    check_capped_attention(AttentionShape { head_dim: 256, ..shape }, 40, Some(0.5));
    check_attention_of_product(KvDtype::Operand, AttentionShape { head_dim: 128, ..shape }, 40);
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
        let Some(mut cuda) = open(KernelSet::Own) else { return };
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
