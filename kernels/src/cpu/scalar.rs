//! The portable form of every op: plain loops over the packed layouts, the reference for all other forms.

use half::bf16;

use super::arena::{Activation, Arena, CacheBlocks, Rows, key_index, value_index};
use super::pack::{Matrix, PANEL, Panels};
use crate::ops::{AttentionShape, BLOCK_TOKENS, Buffer};

/// Where a product goes.
pub struct Sink<'a> {
    /// f32 rows.
    pub out: &'a mut [f32],
    /// Elements from row to row.
    pub stride: usize,
    /// Add to what is there instead of replacing it.
    pub add: bool,
}

/// Norm weights of query and key heads.
#[derive(Clone, Copy)]
pub struct HeadNorms<'a> {
    /// For queries.
    pub q: &'a [f32],
    /// For keys.
    pub k: &'a [f32],
    /// Added to the mean square.
    pub eps: f32,
}

/// Writes a row of values in the form of the buffer.
pub fn store_row(out: &mut Activation, row: usize, values: &[f32]) {
    let range = row * out.stride..row * out.stride + values.len();
    match &mut out.rows {
        Rows::F32(rows) => rows[range].copy_from_slice(values),
        Rows::Bf16(rows) => {
            for (out, &value) in rows[range].iter_mut().zip(values) {
                *out = bf16::from_f32(value).to_bits();
            }
        }
        Rows::Int8 { codes, scales } => {
            let finite = values.iter().all(|value| value.is_finite());
            let maximum = values.iter().fold(0.0_f32, |a, &b| a.max(b.abs()));
            let inverse = if maximum > 0.0 && finite { 127.0 / maximum } else { 0.0 };
            for (out, &value) in codes[range].iter_mut().zip(values) {
                *out = ((value * inverse).round_ties_even() + 128.0) as u8;
            }
            // A row that is not numbers must stay so: it fails alone, at sampling.
            scales[row] = if finite { maximum / 127.0 } else { f32::NAN };
        }
    }
}

/// RMS norm of rows.
pub fn rms_norm(x: &Activation, weight: &[f32], eps: f32, out: &mut Activation, rows: usize) {
    assert_eq!((x.width, out.width), (weight.len(), weight.len()), "width of a norm");
    let mut normed = vec![0.0; x.width];
    for row in 0..rows {
        let values = &x.values()[row * x.stride..row * x.stride + x.width];
        norm(values, weight, eps, &mut normed);
        store_row(out, row, &normed);
    }
}

fn norm(values: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let squares: f32 = values.iter().map(|value| value * value).sum();
    let factor = 1.0 / (squares / values.len() as f32 + eps).sqrt();
    for ((out, value), weight) in out.iter_mut().zip(values).zip(weight) {
        *out = value * factor * weight;
    }
}

/// One row times one panel.
fn panel_product(matrix: &Matrix, panel: usize, x: &Activation, row: usize) -> [f32; PANEL] {
    let columns = matrix.columns;
    let start = panel * matrix.columns_padded * PANEL;
    let row_start = row * x.stride;
    let mut sums = [0.0_f32; PANEL];
    match (&matrix.panels, &x.rows) {
        (Panels::F32(panels), Rows::F32(rows)) => {
            let x = &rows[row_start..row_start + columns];
            for (&x, weights) in x.iter().zip(panels[start..].chunks_exact(PANEL)) {
                for lane in 0..PANEL {
                    sums[lane] = x.mul_add(weights[lane], sums[lane]);
                }
            }
        }
        (Panels::Bf16(panels), Rows::Bf16(rows)) => {
            let x = &rows[row_start..row_start + matrix.columns_padded];
            for (x, weights) in x.chunks_exact(2).zip(panels[start..].chunks_exact(2 * PANEL)) {
                let (x0, x1) = (wide(x[0]), wide(x[1]));
                for lane in 0..PANEL {
                    sums[lane] += x0 * wide(weights[2 * lane]) + x1 * wide(weights[2 * lane + 1]);
                }
            }
        }
        (Panels::Int8 { codes, scales, offsets }, Rows::Int8 { codes: rows, scales: row_scales }) => {
            let x = &rows[row_start..row_start + matrix.columns_padded];
            let mut totals = [0_i32; PANEL];
            for (x, weights) in x.chunks_exact(4).zip(codes[start..].chunks_exact(4 * PANEL)) {
                for lane in 0..PANEL {
                    for part in 0..4 {
                        totals[lane] += i32::from(x[part]) * i32::from(weights[4 * lane + part]);
                    }
                }
            }
            for lane in 0..PANEL {
                let feature = panel * PANEL + lane;
                sums[lane] = (totals[lane] - offsets[feature]) as f32 * (scales[feature] * row_scales[row]);
            }
        }
        _ => panic!("operand and matrix differ in precision"),
    }
    sums
}

fn wide(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Product of operand rows with a matrix.
pub fn linear(matrix: &Matrix, bias: Option<&[f32]>, x: &Activation, rows: usize, sink: Sink<'_>) {
    assert_eq!(x.width, matrix.columns, "width of an operand");
    for panel in 0..matrix.panel_count() {
        let first = panel * PANEL;
        let features = PANEL.min(matrix.rows - first);
        for row in 0..rows {
            let sums = panel_product(matrix, panel, x, row);
            let out = &mut sink.out[row * sink.stride + first..][..features];
            for (lane, out) in out.iter_mut().enumerate() {
                let sum = sums[lane] + bias.map_or(0.0, |bias| bias[first + lane]);
                *out = if sink.add { *out + sum } else { sum };
            }
        }
    }
}

/// Gated product.
pub fn linear_silu_mul(gate_up: &Matrix, x: &Activation, rows: usize, out: &mut Activation) {
    assert_eq!(x.width, gate_up.columns, "width of an operand");
    assert_eq!(out.width.next_multiple_of(PANEL) * 2, gate_up.rows, "width of a gated product");
    let mut values = vec![0.0; out.width.next_multiple_of(PANEL)];
    for row in 0..rows {
        for pair in 0..gate_up.panel_count() / 2 {
            let gate = panel_product(gate_up, 2 * pair, x, row);
            let up = panel_product(gate_up, 2 * pair + 1, x, row);
            for lane in 0..PANEL {
                values[pair * PANEL + lane] = gate[lane] / (1.0 + (-gate[lane]).exp()) * up[lane];
            }
        }
        let width = out.width;
        store_row(out, row, &values[..width]);
    }
}

/// Norms and turns heads, and fills the cache.
pub fn rope_cache(
    arena: &mut Arena,
    layer: usize,
    qkv: Buffer,
    shape: &AttentionShape,
    norms: Option<HeadNorms<'_>>,
) {
    let Arena { plan, buffers, cache, rope, step, .. } = arena;
    let qkv = &mut buffers[qkv.0];
    let (heads, kv_heads, dim) = (shape.heads, shape.kv_heads, shape.head_dim);
    assert_eq!(qkv.width, (heads + 2 * kv_heads) * dim, "width of QKV");
    assert_eq!((kv_heads, dim), (cache.plan.kv_heads, cache.plan.head_dim), "shape of the cache");
    let frequencies = plan.rope.inverse_frequencies.len();
    let stride = qkv.stride;
    let values = qkv.values_mut();
    let mut normed = vec![0.0; dim];
    for span in &step.spans {
        for index in 0..span.rows as usize {
            let row = span.first_row as usize + index;
            let position = span.first_position() as usize + index;
            let values = &mut values[row * stride..];
            let table = &rope[position * frequencies * 2..][..frequencies * 2];
            for head in 0..heads + kv_heads {
                let values = &mut values[head * dim..][..dim];
                if let Some(norms) = norms {
                    norm(values, if head < heads { norms.q } else { norms.k }, norms.eps, &mut normed);
                    values.copy_from_slice(&normed);
                }
                turn(values, table);
            }
            let block = step.block_tables[span.table as usize + position / BLOCK_TOKENS] as usize;
            for head in 0..kv_heads {
                let key = &values[(heads + head) * dim..][..dim];
                let value = &values[(heads + kv_heads + head) * dim..][..dim];
                let start = cache.offset(layer, block, head);
                write_slot(&mut cache.blocks, start, position % BLOCK_TOKENS, key, value);
            }
        }
    }
}

fn turn(head: &mut [f32], table: &[f32]) {
    let half = table.len() / 2;
    for index in 0..half {
        let (cosine, sine) = (table[index], table[half + index]);
        let (a, b) = (head[index], head[half + index]);
        head[index] = a * cosine - b * sine;
        head[half + index] = b * cosine + a * sine;
    }
}

fn write_slot(blocks: &mut CacheBlocks, start: usize, slot: usize, key: &[f32], value: &[f32]) {
    let dim = key.len();
    let values = start + BLOCK_TOKENS * dim;
    for element in 0..dim {
        match blocks {
            CacheBlocks::F32(blocks) => {
                blocks[start + key_index(slot, element, 1)] = key[element];
                blocks[values + value_index(slot, element, dim, 1)] = value[element];
            }
            CacheBlocks::Bf16(blocks) => {
                blocks[start + key_index(slot, element, 2)] = bf16::from_f32(key[element]).to_bits();
                blocks[values + value_index(slot, element, dim, 2)] =
                    bf16::from_f32(value[element]).to_bits();
            }
        }
    }
}

/// Attention, one query head of one row at a time.
pub fn attention(
    arena: &mut Arena,
    layer: usize,
    (qkv, out): (Buffer, Buffer),
    shape: &AttentionShape,
    scores: &mut [f32],
) {
    let Arena { buffers, cache, step, .. } = arena;
    let (qkv, out) = super::pair(buffers, qkv, out);
    let (heads, dim) = (shape.heads, shape.head_dim);
    let group = heads / shape.kv_heads;
    assert_eq!(out.width, heads * dim, "width of attention's result");
    let mut result = vec![0.0; heads * dim];
    for span in &step.spans {
        for index in 0..span.rows as usize {
            let row = span.first_row as usize + index;
            let position = span.first_position() as usize + index;
            let first =
                shape.sliding_window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
            let table = &step.block_tables[span.table as usize..];
            for head in 0..heads {
                let query = &qkv.values()[row * qkv.stride + head * dim..][..dim];
                let read = |position: usize| {
                    let block = table[position / BLOCK_TOKENS] as usize;
                    (cache.offset(layer, block, head / group), position % BLOCK_TOKENS)
                };
                let scores = &mut scores[first..=position];
                for (index, score) in scores.iter_mut().enumerate() {
                    let (start, slot) = read(first + index);
                    *score = shape.scale * score_of(&cache.blocks, start, slot, query);
                }
                softmax(scores);
                let result = &mut result[head * dim..][..dim];
                result.fill(0.0);
                for (index, &score) in scores.iter().enumerate() {
                    let (start, slot) = read(first + index);
                    add_value(&cache.blocks, start + BLOCK_TOKENS * dim, slot, score, result);
                }
            }
            store_row(out, row, &result);
        }
    }
}

fn score_of(blocks: &CacheBlocks, start: usize, slot: usize, query: &[f32]) -> f32 {
    let mut sum = 0.0;
    for (element, &query) in query.iter().enumerate() {
        sum += match blocks {
            CacheBlocks::F32(blocks) => query * blocks[start + key_index(slot, element, 1)],
            CacheBlocks::Bf16(blocks) => {
                bf16::from_f32(query).to_f32() * wide(blocks[start + key_index(slot, element, 2)])
            }
        };
    }
    sum
}

fn add_value(blocks: &CacheBlocks, start: usize, slot: usize, score: f32, result: &mut [f32]) {
    let dim = result.len();
    for (element, result) in result.iter_mut().enumerate() {
        *result += score
            * match blocks {
                CacheBlocks::F32(blocks) => blocks[start + value_index(slot, element, dim, 1)],
                CacheBlocks::Bf16(blocks) => wide(blocks[start + value_index(slot, element, dim, 2)]),
            };
    }
}

fn softmax(scores: &mut [f32]) {
    let maximum = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - maximum).exp();
        sum += *score;
    }
    for score in scores {
        *score /= sum;
    }
}

/// Moves the chosen rows to the front. They ascend, so a row is never overwritten before it is moved.
pub fn narrow(buffer: &mut Activation, chosen: &[u32]) {
    let stride = buffer.stride;
    for (to, &from) in chosen.iter().enumerate() {
        let from = from as usize;
        let range = from * stride..(from + 1) * stride;
        match &mut buffer.rows {
            Rows::F32(rows) => rows.copy_within(range, to * stride),
            Rows::Bf16(rows) => rows.copy_within(range, to * stride),
            Rows::Int8 { codes, scales } => {
                codes.copy_within(range, to * stride);
                scales[to] = scales[from];
            }
        }
    }
}
