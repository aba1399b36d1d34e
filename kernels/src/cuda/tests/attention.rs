//! Attention over the paged cache, in each of its types, against its definition in f64.

use super::*;

/// A sequence's rows through RoPE and attention in chunks, against f64.
struct Attended {
    shape: AttentionShape,
    kv: KvDtype,
    context: usize,
    /// What scores are capped at.
    cap: Option<f32>,
    qkv: Vec<f32>,
    norms: [Vec<f32>; 2],
    /// Norms are over all heads of a row at once.
    whole: bool,
    /// The position embedding: 0 turns whole heads, 1 a part of each.
    rope: Option<usize>,
    /// Operand and matrix of which `qkv` is the product; without them the values are put where RoPE finds them.
    product: Option<(Vec<f32>, Vec<f32>)>,
}

/// Columns of a product that gives queries, keys and values.
const COLUMNS: usize = 192;

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
            let (first, count) = if head < heads { (0, heads) } else { (heads, kv_heads) };
            let (normed, weight) = if self.whole {
                let all = &self.qkv[row * self.width() + first * head_dim..][..count * head_dim];
                (all, &self.norms[usize::from(head >= heads)][(head - first) * head_dim..][..head_dim])
            } else {
                (source, &self.norms[usize::from(head >= heads)][..])
            };
            let square = normed.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / normed.len() as f64;
            for (value, &weight) in values.iter_mut().zip(weight) {
                *value *= f64::from(weight) / (square + 1e-6).sqrt();
            }
            let frequencies = self.rope.map_or(Vec::new(), |rope| frequencies(rope, head_dim));
            let pairs = frequencies.len();
            for (i, frequency) in frequencies.into_iter().enumerate() {
                let angle = f64::from(row as f32 * frequency);
                let (a, b) = (values[i], values[i + pairs]);
                values[i] = a * angle.cos() - b * angle.sin();
                values[i + pairs] = b * angle.cos() + a * angle.sin();
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
                let score = f64::from(scale) * query.iter().zip(&key).map(|(a, b)| a * b).sum::<f64>();
                self.cap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh())
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

    /// The matrix of queries, keys and values.
    fn matrix(&self, cuda: &mut Cuda, weights: &[f32]) -> Matrix {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let raw = bytes(weights);
        let mut left = &raw[..];
        let parts: Vec<HostTensor<'_>> = [heads, kv_heads, kv_heads]
            .into_iter()
            .map(|heads| {
                let (part, rest) = left.split_at(heads * head_dim * COLUMNS * 4);
                left = rest;
                HostTensor::new(DType::F32, &[heads * head_dim, COLUMNS], part).unwrap()
            })
            .collect();
        cuda.qkv_matrix(&parts, head_dim).unwrap()
    }

    /// All rows, computed in chunks of this many; where they are `crowded`, then once more, each as a sequence of its
    /// own in a step of so many decodes.
    fn run(&self, set: KernelSet, chunk: usize, crowded: bool) -> Option<Vec<f32>> {
        use BufferKind::{Operand, Values};
        let mut cuda = open(set)?;
        let (shape, out_width) = (&self.shape, self.shape.heads * self.shape.head_dim);
        let (q, k) = (vector(&mut cuda, &self.norms[0]), vector(&mut cuda, &self.norms[1]));
        let kv = KvPlan {
            layers: 2,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            blocks: 300,
            dtype: self.kv,
        };
        let (qkv, out, x) = (Buffer(0), Buffer(1), Buffer(2));
        let widths = [(self.width(), Values), (out_width, Operand), (COLUMNS, Operand)];
        let matrix = self.product.as_ref().map(|(_, weights)| self.matrix(&mut cuda, weights));
        cuda.allocate(ArenaPlan { score_cap: self.cap, ..plan(&widths, kv, shape.heads, chunk) }).unwrap();
        cuda.add_rope(&RopePlan { inverse_frequencies: frequencies(1, shape.head_dim), amplitude: 1.0 })
            .unwrap();
        let tables: Vec<u32> = (0..256).map(|block| (block * 7 + 3) % 300).collect();
        let mut step = |first: usize, spans: &[RowSpan]| {
            let rows = spans.iter().map(|span| span.rows as usize).sum::<usize>();
            let tokens = vec![0; rows];
            let batch = Batch { tokens: &tokens, feeds: &[], spans, block_tables: &tables, logits_rows: &[] };
            cuda.begin(&batch).unwrap();
            put(&cuda, qkv, &self.qkv[first * self.width()..][..rows * self.width()]);
            if let (Some(matrix), Some((input, _))) = (&matrix, &self.product) {
                put(&cuda, qkv, &vec![f32::NAN; rows * self.width()]);
                put(&cuda, x, &input[first * COLUMNS..][..rows * COLUMNS]);
                cuda.linear(matrix, None, x, qkv);
            }
            put(&cuda, out, &vec![f32::NAN; rows * out_width]);
            let norms = Some(QkNorm { q: &q, k: &k, eps: 1e-6 });
            cuda.heads_cache(1, qkv, shape, HeadWork { norms, whole: self.whole, rope: self.rope });
            cuda.attention(1, qkv, shape, out);
            take(&mut cuda, out, rows)
        };
        let span = |first_row: usize, rows: usize, context: usize| RowSpan {
            first_row: first_row as u32,
            rows: rows as u32,
            context: context as u32,
            table: 0,
        };
        let mut all = Vec::new();
        for done in (0..self.context).step_by(chunk) {
            let rows = chunk.min(self.context - done);
            all.extend(step(done, &[span(0, rows, done + rows)]));
        }
        if crowded {
            // The cache holds all rows; this step writes the same bytes again.
            let spans: Vec<RowSpan> = (0..self.context).map(|row| span(row, 1, row + 1)).collect();
            all = step(0, &spans);
        }
        Some(all)
    }
}

/// Of the two position embeddings: that of a plan, and one that turns three quarters of a head.
fn frequencies(rope: usize, head_dim: usize) -> Vec<f32> {
    match rope {
        0 => plan(&[], KvPlan { head_dim, ..NO_KV }, 1, 1).rope.inverse_frequencies,
        _ => (0..head_dim * 3 / 8).map(|i| 0.7_f32.powi(i as i32 % 9)).collect(),
    }
}

/// Not powers of two: these would change no code.
const SCALES: KvScales = KvScales { key: 0.013, value: 0.003 };

pub(super) fn check_attention(shape: AttentionShape, context: usize) {
    check_capped_attention(shape, context, None);
}

pub(super) fn check_capped_attention(shape: AttentionShape, context: usize, cap: Option<f32>) {
    for kv in [KvDtype::Operand, KvDtype::Fp8E4m3] {
        check_attention_over(kv, AttentionShape { kv_scales: SCALES, ..shape }, (context, cap));
    }
}

fn check_attention_over(kv: KvDtype, shape: AttentionShape, (context, cap): (usize, Option<f32>)) {
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let attended = Attended {
        shape,
        kv,
        context,
        cap,
        qkv: random(11, context * width),
        norms: [random(12, shape.head_dim), random(13, shape.head_dim)],
        whole: false,
        rope: Some(0),
        product: None,
    };
    check_attended(&attended);
}

/// Heads that are turned by a part, by nothing, and normed all at once.
#[test]
fn heads_are_normed_and_turned_as_asked() {
    for (heads, kv_heads, head_dim) in [(6, 2, 64), (4, 4, 128), (4, 1, 256)] {
        let scale = (head_dim as f32).powf(-0.5);
        let shape =
            AttentionShape { heads, kv_heads, head_dim, scale, sliding_window: None, kv_scales: SCALES };
        let width = (heads + 2 * kv_heads) * head_dim;
        for (whole, rope) in [(false, Some(1)), (false, None), (true, Some(0)), (true, None)] {
            let weights = |heads| if whole { heads * head_dim } else { head_dim };
            check_attended(&Attended {
                shape,
                kv: KvDtype::Operand,
                context: 50,
                cap: None,
                qkv: random(11, 50 * width),
                norms: [random(12, weights(heads)), random(13, weights(kv_heads))],
                whole,
                rope,
                product: None,
            });
        }
    }
}

/// The same behind a product, of which RoPE is then a part.
pub(super) fn check_attention_of_product(kv: KvDtype, shape: AttentionShape, context: usize) {
    let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
    let (input, weights) = (random(14, context * COLUMNS), random(15, width * COLUMNS));
    let dot = |row: &[f32], feature: &[f32]| -> f64 {
        row.iter().zip(feature).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let rows = input.chunks_exact(COLUMNS);
    let qkv = rows
        .flat_map(|row| weights.chunks_exact(COLUMNS).map(move |feature| dot(row, feature) as f32))
        .collect();
    let norms = [random(12, shape.head_dim), random(13, shape.head_dim)];
    let product = Some((input, weights));
    let attended =
        Attended { shape, kv, context, cap: None, qkv, norms, whole: false, rope: Some(0), product };
    check_attended(&attended);
}

fn check_attended(attended: &Attended) {
    let Attended { shape, kv, context, .. } = *attended;
    let mut known: Vec<(KernelSet, Vec<f32>)> = Vec::new();
    let sets = [KernelSet::Own, KernelSet::Portable, KernelSet::Small];
    let ways = [(context, false), (100, false), (1, false), (context, true)];
    for (set, (chunk, crowded)) in sets.into_iter().flat_map(|set| ways.map(|way| (set, way))) {
        if chunk == 1 && context > 300 {
            continue;
        }
        let Some(found) = attended.run(set, chunk, crowded) else { return };
        let out = shape.heads * shape.head_dim;
        for row in (0..context).step_by((context / 9).max(1)).chain([context - 1]) {
            let error = distance(&found[row * out..][..out], &attended.expected(row));
            assert!(error < 1e-2, "{shape:?} {kv:?} chunk {chunk} row {row} {set:?}: {error}");
        }
        assert!(found.iter().all(|value| value.is_finite()));
        // Behind a product, heads are turned by it or after it, which rounds otherwise; attention itself is alike.
        match known.iter().find(|(other, _)| *other == set || attended.product.is_none()) {
            Some((_, first)) => {
                let differ = found.iter().zip(first).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                assert_eq!(
                    differ, 0,
                    "{shape:?} {kv:?} {set:?} in chunks of {chunk}, crowded {crowded}: bytes differ"
                );
            }
            None => known.push((set, found)),
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
    check_attention(shape(8, 2, 96), 130);
    check_attention(shape(2, 2, 256), 130);
    check_attention(shape(2, 1, 128), 1200);
    check_attention(AttentionShape { sliding_window: Some(50), ..shape(4, 2, 64) }, 250);
    // Groups that decodes cut into parts: of 6, 8, 1 and 8 heads.
    check_attention(shape(24, 2, 64), 130);
    check_attention(shape(16, 1, 64), 530);
    check_attention(AttentionShape { sliding_window: Some(50), ..shape(13, 1, 96) }, 130);
    check_attention(shape(64, 1, 64), 40);
    check_capped_attention(shape(4, 2, 64), 250, Some(0.5));
    check_capped_attention(shape(4, 2, 96), 130, Some(2.0));
    check_capped_attention(AttentionShape { sliding_window: Some(50), ..shape(4, 2, 128) }, 250, Some(0.5));
    check_capped_attention(shape(4, 2, 256), 250, Some(0.5));
}

#[test]
fn heads_are_turned_as_their_product_ends() {
    for kv in [KvDtype::Operand, KvDtype::Fp8E4m3] {
        for (heads, kv_heads, head_dim) in [(9, 3, 64), (4, 2, 128), (7, 1, 64), (8, 8, 128)] {
            let scale = (head_dim as f32).powf(-0.5);
            let shape =
                AttentionShape { heads, kv_heads, head_dim, scale, sliding_window: None, kv_scales: SCALES };
            check_attention_of_product(kv, shape, 290);
        }
    }
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
    let Some(mut cuda) = open(KernelSet::Own) else { return };
    let (heads, row) = (shape.heads * shape.head_dim, 3 * shape.heads * shape.head_dim);
    let rows = 65_536 / heads;
    let kv = KvPlan { layers: 1, kv_heads: 64, head_dim: 64, blocks: rows, dtype: KvDtype::Fp8E4m3 };
    cuda.allocate(plan(&[(row, Values), (heads, Operand)], kv, shape.heads, rows)).unwrap();
    let (tokens, tables) = (vec![0; rows], (0..rows as u32).collect::<Vec<_>>());
    let spans: Vec<RowSpan> =
        tables.iter().map(|&row| RowSpan { first_row: row, rows: 1, context: 1, table: row }).collect();
    let batch = Batch { tokens: &tokens, feeds: &[], spans: &spans, block_tables: &tables, logits_rows: &[] };
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
