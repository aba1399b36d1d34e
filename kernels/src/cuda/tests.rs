//! Every kernel on a device against plain arithmetic in f64, over poisoned outputs, and byte for byte against itself
//! at other batch sizes. Without a device each test says that it was skipped.

use half::bf16;

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

/// A sequence's rows through RoPE and attention in chunks, against f64.
struct Attended {
    shape: AttentionShape,
    kv: KvDtype,
    context: usize,
    qkv: Vec<f32>,
    norms: [Vec<f32>; 2],
}

impl Attended {
    fn width(&self) -> usize {
        (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim
    }

    /// A head of a row after norm and RoPE, rounded as the cache holds it.
    fn head(&self, row: usize, head: usize) -> Vec<f64> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let source = &self.qkv[row * self.width() + head * head_dim..][..head_dim];
        let mut values: Vec<f64> = source.iter().map(|&v| f64::from(v)).collect();
        if head < heads + kv_heads {
            let weight = &self.norms[usize::from(head >= heads)];
            let square = values.iter().map(|v| v * v).sum::<f64>() / head_dim as f64;
            for (value, &weight) in values.iter_mut().zip(weight) {
                *value *= f64::from(weight) / (square + 1e-6).sqrt();
            }
            let frequencies = plan(&[], KvPlan { head_dim, ..NO_KV }, 1, 1).rope.inverse_frequencies;
            for (i, &frequency) in frequencies.iter().enumerate() {
                let angle = f64::from(row as f32 * frequency);
                let (a, b) = (values[i], values[i + head_dim / 2]);
                values[i] = a * angle.cos() - b * angle.sin();
                values[i + head_dim / 2] = b * angle.cos() + a * angle.sin();
            }
        }
        let AttentionShape { kv_scales: KvScales { key, value }, .. } = self.shape;
        let scale = if head < heads + kv_heads { key } else { value };
        let kept = |value: f64| match self.kv {
            KvDtype::Fp8E4m3 if head >= heads => {
                f64::from(e4m3::decode(e4m3::encode(value as f32 * (1.0 / scale)))) * f64::from(scale)
            }
            _ => f64::from(bf16::from_f32(value as f32).to_f32()),
        };
        values.into_iter().map(kept).collect()
    }

    fn expected(&self, row: usize) -> Vec<f64> {
        let AttentionShape { heads, kv_heads, scale, sliding_window, .. } = self.shape;
        let first = sliding_window.map_or(0, |window| (row + 1).saturating_sub(window as usize));
        let of = |head: usize| -> Vec<f64> {
            let (query, kv_head) = (self.head(row, head), head / (heads / kv_heads));
            let score = |key: usize| -> f64 {
                let key = self.head(key, heads + kv_head);
                f64::from(scale) * query.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>()
            };
            let scores: Vec<f64> = (first..=row).map(score).collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - most).exp()).collect();
            let total: f64 = weights.iter().sum();
            let mut sum = vec![0.0; query.len()];
            for (key, weight) in (first..=row).zip(&weights) {
                for (sum, value) in sum.iter_mut().zip(self.head(key, heads + kv_heads + kv_head)) {
                    *sum += weight / total * value;
                }
            }
            sum
        };
        (0..heads).flat_map(of).collect()
    }

    /// All rows, computed in chunks of this many.
    fn run(&self, portable: bool, chunk: usize) -> Option<Vec<f32>> {
        use BufferKind::{Operand, Values};
        let mut cuda = open(portable)?;
        let (shape, out_width) = (&self.shape, self.shape.heads * self.shape.head_dim);
        let (q, k) = (vector(&mut cuda, &self.norms[0]), vector(&mut cuda, &self.norms[1]));
        let kv = KvPlan {
            layers: 2,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            blocks: 300,
            dtype: self.kv,
        };
        let (qkv, out) = (Buffer(0), Buffer(1));
        let widths = [(self.width(), Values), (out_width, Operand)];
        cuda.allocate(plan(&widths, kv, shape.heads, chunk)).unwrap();
        let tables: Vec<u32> = (0..256).map(|block| (block * 7 + 3) % 300).collect();
        let mut all = Vec::new();
        let mut done = 0;
        while done < self.context {
            let rows = chunk.min(self.context - done);
            let tokens = vec![0; rows];
            let context = (done + rows) as u32;
            let span = Span { first_row: 0, rows: rows as u32, context, table: 0 };
            let batch = Batch { tokens: &tokens, spans: &[span], block_tables: &tables, logits_rows: &[] };
            cuda.begin(&batch).unwrap();
            put(&cuda, qkv, &self.qkv[done * self.width()..][..rows * self.width()]);
            put(&cuda, out, &vec![f32::NAN; rows * out_width]);
            let norms = QkNorm { q: &q, k: &k, eps: 1e-6 };
            cuda.rope_cache(1, qkv, shape, Some(norms));
            cuda.attention(1, qkv, shape, out);
            all.extend(take(&mut cuda, out, rows));
            done += rows;
        }
        Some(all)
    }
}

/// Not powers of two: these would change no code.
const SCALES: KvScales = KvScales { key: 0.013, value: 0.003 };

fn check_attention(shape: AttentionShape, context: usize) {
    for kv in [KvDtype::Operand, KvDtype::Fp8E4m3] {
        check_attention_over(kv, AttentionShape { kv_scales: SCALES, ..shape }, context);
    }
}

fn check_attention_over(kv: KvDtype, shape: AttentionShape, context: usize) {
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let attended = Attended {
        shape,
        kv,
        context,
        qkv: random(11, context * width),
        norms: [random(12, shape.head_dim), random(13, shape.head_dim)],
    };
    let mut known: Vec<(bool, Vec<f32>)> = Vec::new();
    for (portable, chunk) in [(false, context), (false, 100), (false, 1), (true, context), (true, 1)] {
        if chunk == 1 && context > 300 {
            continue;
        }
        let Some(found) = attended.run(portable, chunk) else { return };
        let out = shape.heads * shape.head_dim;
        for row in (0..context).step_by((context / 9).max(1)).chain([context - 1]) {
            let error = distance(&found[row * out..][..out], &attended.expected(row));
            assert!(error < 1e-2, "{shape:?} {kv:?} chunk {chunk} row {row} portable {portable}: {error}");
        }
        assert!(found.iter().all(|value| value.is_finite()));
        match known.iter().find(|(other, _)| *other == portable) {
            Some((_, first)) => {
                let differ = found.iter().zip(first).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                assert_eq!(differ, 0, "{shape:?} {kv:?} in chunks of {chunk}: bytes depend on the chunk");
            }
            None => known.push((portable, found)),
        }
    }
}

#[test]
fn attention_is_right_in_any_chunks() {
    let shape = |heads, kv_heads, head_dim: usize| AttentionShape {
        heads,
        kv_heads,
        head_dim,
        scale: (head_dim as f32).powf(-0.5),
        sliding_window: None,
        kv_scales: KvScales::ONE,
    };
    check_attention(shape(9, 3, 64), 250);
    check_attention(shape(4, 2, 128), 250);
    check_attention(shape(14, 2, 64), 130);
    check_attention(shape(4, 1, 96), 130);
    check_attention(shape(2, 2, 256), 130);
    check_attention(shape(2, 1, 128), 1200);
    check_attention(AttentionShape { sliding_window: Some(50), ..shape(4, 2, 64) }, 250);
}

/// Every value of 16 bits through the cache of 8: with one position, attention gives the value itself. What is not a
/// number poisons its own head alone; infinity saturates, as in [`e4m3::encode`].
#[test]
fn values_are_rounded_as_on_the_host() {
    use BufferKind::{Operand, Values};
    let shape = AttentionShape {
        heads: 64,
        kv_heads: 64,
        head_dim: 64,
        scale: 0.125,
        sliding_window: None,
        kv_scales: KvScales::ONE,
    };
    let Some(mut cuda) = open(false) else { return };
    let (heads, row) = (shape.heads * shape.head_dim, 3 * shape.heads * shape.head_dim);
    let rows = 65_536 / heads;
    let kv = KvPlan { layers: 1, kv_heads: 64, head_dim: 64, blocks: rows, dtype: KvDtype::Fp8E4m3 };
    cuda.allocate(plan(&[(row, Values), (heads, Operand)], kv, shape.heads, rows)).unwrap();
    let (tokens, tables) = (vec![0; rows], (0..rows as u32).collect::<Vec<_>>());
    let spans: Vec<Span> =
        tables.iter().map(|&row| Span { first_row: row, rows: 1, context: 1, table: row }).collect();
    let batch = Batch { tokens: &tokens, spans: &spans, block_tables: &tables, logits_rows: &[] };
    cuda.begin(&batch).unwrap();
    let value = |bits: usize| f32::from_bits((bits as u32) << 16);
    let mut qkv = vec![0.0; rows * row];
    for (index, line) in qkv.chunks_exact_mut(row).enumerate() {
        line[2 * heads..].iter_mut().enumerate().for_each(|(at, into)| *into = value(index * heads + at));
    }
    put(&cuda, Buffer(0), &qkv);
    cuda.rope_cache(0, Buffer(0), &shape, None);
    cuda.attention(0, Buffer(0), &shape, Buffer(1));
    for (bits, found) in take(&mut cuda, Buffer(1), rows).into_iter().enumerate() {
        let expected = e4m3::decode(e4m3::encode(value(bits)));
        let same = if expected.is_nan() { found.is_nan() } else { found == expected };
        assert!(same, "{:e}: {found} for {expected}", value(bits));
    }
}

/// Samples given logits on the device.
fn sample(cuda: &mut Cuda, logits: &[f32], rows: &[SampleRow<'_>]) -> Vec<Sampled> {
    let count = rows.len();
    let tokens = vec![0; count];
    let tables = vec![0; count];
    let spans: Vec<Span> =
        (0..count as u32).map(|row| Span { first_row: row, rows: 1, context: 1, table: row }).collect();
    let logits_rows: Vec<u32> = (0..count as u32).collect();
    let batch = Batch { tokens: &tokens, spans: &spans, block_tables: &tables, logits_rows: &logits_rows };
    cuda.begin(&batch).unwrap();
    let (arena, vocabulary) = (cuda.arena(), cuda.arena().plan.vocabulary);
    for (row, values) in logits.chunks_exact(vocabulary).enumerate() {
        let at = arena.logits + (row * arena.logits_stride * 4) as u64;
        arena.write(&cuda.device, at, &bytes(values)).unwrap();
    }
    let mut out = Vec::new();
    cuda.run_sampled(rows, &mut out).unwrap();
    out
}

fn sampling_device(vocabulary: usize) -> Option<Cuda> {
    let mut cuda = open(false)?;
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

fn check_logprobs(found: &Choice, expected: &Choice) {
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
