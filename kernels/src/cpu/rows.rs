//! Ops on rows: embedding, norms, position embedding with the cache's writes, and the forms of operands.
//!
//! Rows are spread over the threads in small runs; a few rows are not worth a dispatch and stay on the caller.

use super::arena::{Activation, Arena, CacheBlocks, CodeRows, Rows, cut};
use super::fp8::{self, KvEntry};
use super::lanes;
use super::pack::Matrix;
use super::tile::LEFT_TOP;
use crate::isa::Isa;
use crate::ops::{AttentionShape, BLOCK_TOKENS, Buffer};
use crate::pool::{Pool, Scattered};

/// Rows of a task.
const TASK_ROWS: usize = 8;

/// Operand rows taken apart for a dispatch.
#[derive(Clone, Copy)]
pub enum ScatteredRows {
    /// f32 operands or values.
    F32(Scattered<f32>),
    /// bf16 operands.
    Bf16(Scattered<u16>),
    /// Scaled f16 operands.
    F16(Scattered<u16>, Scattered<f32>),
    /// Quantised operands.
    Int8(Scattered<u8>, Scattered<f32>),
}

impl ScatteredRows {
    /// Takes a buffer's rows apart.
    pub fn new(buffer: &mut Activation) -> Self {
        match &mut buffer.rows {
            Rows::F32(rows) => ScatteredRows::F32(Scattered::new(rows)),
            Rows::Bf16(rows) => ScatteredRows::Bf16(Scattered::new(rows)),
            Rows::F16 { halves, scales } => {
                ScatteredRows::F16(Scattered::new(halves), Scattered::new(scales))
            }
            Rows::Int8(CodeRows { codes, scales }) => {
                ScatteredRows::Int8(Scattered::new(codes), Scattered::new(scales))
            }
        }
    }

    /// Writes values from element `first` on (counted over all rows), but for rows that have a scale.
    ///
    /// # Safety
    /// No one else writes or reads these elements in this dispatch.
    pub unsafe fn put(&self, isa: Isa, first: usize, values: &[f32]) {
        // SAFETY: passed on.
        unsafe {
            match self {
                ScatteredRows::F32(rows) => rows.range(first, values.len()).copy_from_slice(values),
                ScatteredRows::Bf16(rows) => lanes::to_bf16(isa, values, rows.range(first, values.len())),
                ScatteredRows::F16(..) | ScatteredRows::Int8(..) => {
                    panic!("a part of a scaled row cannot be written")
                }
            }
        }
    }

    /// Scales the values of row `row`, of rows `stride` elements apart.
    ///
    /// # Safety
    /// As [`ScatteredRows::put`].
    unsafe fn scale(&self, isa: Isa, (row, stride): (usize, usize), values: &[f32]) {
        let first = row * stride;
        // SAFETY: passed on.
        unsafe {
            match self {
                ScatteredRows::F16(halves, scales) => {
                    let halves = halves.range(first, values.len());
                    lanes::to_f16(isa, values, LEFT_TOP, halves, &mut scales.range(row, 1)[0]);
                }
                ScatteredRows::Int8(codes, scales) => {
                    let codes = codes.range(first, values.len());
                    lanes::quantise(isa, values, codes, &mut scales.range(row, 1)[0]);
                }
                ScatteredRows::F32(_) | ScatteredRows::Bf16(_) => panic!("the rows have no scale"),
            }
        }
    }
}

/// An operand's rows taken apart, in every form that its matrices read.
#[derive(Clone, Copy)]
struct OperandRows {
    rows: ScatteredRows,
    codes: Option<ScatteredRows>,
}

impl OperandRows {
    fn new(buffer: &mut Activation) -> Self {
        let codes = buffer.codes.as_mut().map(|codes| {
            ScatteredRows::Int8(Scattered::new(&mut codes.codes), Scattered::new(&mut codes.scales))
        });
        Self { rows: ScatteredRows::new(buffer), codes }
    }

    /// Whether rows are written whole.
    fn is_whole(&self) -> bool {
        self.codes.is_some() || matches!(self.rows, ScatteredRows::F16(..) | ScatteredRows::Int8(..))
    }

    /// Writes the values of row `row`, of rows `stride` elements apart, in all forms.
    ///
    /// # Safety
    /// As [`ScatteredRows::put`].
    unsafe fn write(&self, isa: Isa, (row, stride): (usize, usize), values: &[f32]) {
        // SAFETY: passed on.
        unsafe {
            match self.rows {
                ScatteredRows::F32(_) | ScatteredRows::Bf16(_) => self.rows.put(isa, row * stride, values),
                ScatteredRows::F16(..) | ScatteredRows::Int8(..) => {
                    self.rows.scale(isa, (row, stride), values);
                }
            }
            if let Some(codes) = self.codes {
                codes.scale(isa, (row, stride), values);
            }
        }
    }
}

/// Runs `work(row)` for each row.
fn each_row(pool: &mut Pool, rows: usize, work: impl Fn(usize) + Sync) {
    pool.run(rows.div_ceil(TASK_ROWS), |_, task| {
        (task * TASK_ROWS..rows.min((task + 1) * TASK_ROWS)).for_each(&work);
    });
}

/// Looks up the rows of tokens.
pub fn embed(pool: &mut Pool, table: &Matrix, tokens: &[u32], out: &mut Activation) {
    assert_eq!(out.width, table.columns, "width of the embedding");
    let (width, stride) = (out.width, out.stride);
    let out = Scattered::new(out.values_mut());
    each_row(pool, tokens.len(), |row| {
        // SAFETY: each row belongs to one task.
        table.read_row(tokens[row] as usize, unsafe { out.range(row * stride, width) });
    });
}

/// Activations of a norm.
pub struct Norm<'a> {
    /// Values.
    pub x: &'a Activation,
    /// Operand or values.
    pub out: &'a mut Activation,
    /// Room for rows as wide as those of `out`, used when they are scaled.
    pub scratch: &'a mut [f32],
    /// Rows to norm.
    pub rows: usize,
}

/// RMS norm of rows, into the form of an operand (or values).
pub fn rms_norm(pool: &mut Pool, isa: Isa, norm: Norm<'_>, (weight, eps): (&[f32], f32)) {
    let Norm { x, out, scratch, rows } = norm;
    let scratch = Scattered::new(scratch);
    assert_eq!((x.width, out.width), (weight.len(), weight.len()), "width of a norm");
    let (width, stride) = (x.width, out.stride);
    let values = x.values();
    let store = OperandRows::new(out);
    each_row(pool, rows, |row| {
        let values = &values[row * x.stride..][..width];
        // SAFETY: each row belongs to one task.
        unsafe {
            match store.rows {
                _ if store.is_whole() => {
                    let normed = scratch.range(row * stride, width);
                    lanes::norm(isa, values, weight, eps, normed);
                    store.write(isa, (row, stride), normed);
                }
                ScatteredRows::F32(rows) => {
                    lanes::norm(isa, values, weight, eps, rows.range(row * stride, width))
                }
                ScatteredRows::Bf16(rows) => {
                    lanes::norm_bf16(isa, values, weight, eps, rows.range(row * stride, width));
                }
                ScatteredRows::F16(..) | ScatteredRows::Int8(..) => unreachable!("such rows are whole"),
            }
        }
    });
}

/// Writes rows of values into operands that are written whole.
pub fn scale(pool: &mut Pool, isa: Isa, values: &[f32], out: &mut Activation, rows: usize) {
    let (width, stride) = (out.width, out.stride);
    let store = OperandRows::new(out);
    each_row(pool, rows, |row| {
        // SAFETY: each row belongs to one task.
        unsafe { store.write(isa, (row, stride), &values[row * stride..][..width]) };
    });
}

/// Rounds rows of values into operands.
pub fn round(pool: &mut Pool, isa: Isa, (x, out): (&Activation, &mut Activation), rows: usize) {
    assert_eq!(x.width, out.width, "width of operands");
    let (width, stride, values) = (x.width, out.stride, x.values());
    let store = OperandRows::new(out);
    each_row(pool, rows, |row| {
        // SAFETY: each row belongs to one task.
        unsafe { store.write(isa, (row, stride), &values[row * x.stride..][..width]) };
    });
}

/// `values *= factor`, row by row.
pub fn multiply(pool: &mut Pool, x: &mut Activation, factor: f32, rows: usize) {
    let (width, stride) = (x.width, x.stride);
    let values = Scattered::new(x.values_mut());
    each_row(pool, rows, |row| {
        // SAFETY: each row belongs to one task.
        unsafe { values.range(row * stride, width) }.iter_mut().for_each(|value| *value *= factor);
    });
}

/// What is done to a branch before it is added to the residual stream.
#[derive(Clone, Copy)]
pub enum Before<'a> {
    /// Its RMS norm, with weight and what is added to the mean square.
    Norm(&'a [f32], f32),
    /// It is multiplied.
    Times(f32),
}

/// `residual += before(x)`, row by row. The rows of `x` are lost.
pub fn add(
    pool: &mut Pool,
    isa: Isa,
    (x, residual): (&mut Activation, &mut Activation),
    before: Before<'_>,
    rows: usize,
) {
    assert_eq!(x.width, residual.width, "width of a branch");
    let (width, from, to) = (x.width, x.stride, residual.stride);
    let (x, residual) = (Scattered::new(x.values_mut()), Scattered::new(residual.values_mut()));
    each_row(pool, rows, |row| {
        // SAFETY: each row belongs to one task.
        let (x, residual) = unsafe { (x.range(row * from, width), residual.range(row * to, width)) };
        let factor = match before {
            Before::Norm(weight, eps) => {
                lanes::norm_in_place(isa, x, weight, eps);
                1.0
            }
            Before::Times(factor) => factor,
        };
        for (sum, &value) in residual.iter_mut().zip(&*x) {
            *sum += factor * value;
        }
    });
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
    /// Over all heads at once.
    pub whole: bool,
}

impl HeadNorms<'_> {
    /// Norms the queries and keys of a row.
    fn apply(&self, isa: Isa, row: &mut [f32], (heads, dim): (usize, usize)) {
        let (queries, keys) = row.split_at_mut(heads * dim);
        for (part, weight) in [(queries, self.q), (keys, self.k)] {
            let at_once = if self.whole { part.len() } else { dim };
            for values in part.chunks_exact_mut(at_once) {
                lanes::norm_in_place(isa, values, weight, self.eps);
            }
        }
    }
}

/// Norms and turns heads, and fills the cache.
///
/// A block is cleared when its first slot is written: attention multiplies the slots that a row may not see by
/// zero, and what an earlier owner left there might not be a number.
pub fn rope_cache(
    pool: &mut Pool,
    isa: Isa,
    arena: &mut Arena,
    (layer, qkv): (usize, Buffer),
    (shape, norms, rope): (&AttentionShape, Option<HeadNorms<'_>>, Option<usize>),
) {
    let Arena { buffers, cache, ropes, step, runs, .. } = arena;
    let qkv = &mut buffers[qkv.0];
    let (heads, kv_heads, dim) = (shape.heads, shape.kv_heads, shape.head_dim);
    assert_eq!(qkv.width, (heads + 2 * kv_heads) * dim, "width of QKV");
    assert_eq!((kv_heads, dim), (cache.plan.kv_heads, cache.plan.head_dim), "shape of the cache");
    let rope = rope.map(|rope| &ropes[rope]);
    let (stride, width) = (qkv.stride, qkv.width);
    let values = Scattered::new(qkv.values_mut());
    // Runs inside one block: two threads never write the same block.
    cut(&step.spans, BLOCK_TOKENS, runs);
    let places = cache.places();
    let slots = match &mut cache.blocks {
        CacheBlocks::F32(blocks) => Slots::F32(Scattered::new(blocks)),
        CacheBlocks::Bf16(blocks) => Slots::Paired(Scattered::new(blocks), write_bf16),
        CacheBlocks::F16(blocks) => Slots::Paired(Scattered::new(blocks), write_f16),
        CacheBlocks::E4m3(blocks) => {
            let scales = (1.0 / shape.kv_scales.key, 1.0 / shape.kv_scales.value);
            Slots::E4m3(Scattered::new(blocks), cache.pack, scales)
        }
    };
    let runs = &runs[..];
    let tasks = runs.len().div_ceil(4);
    pool.run(tasks, |_, task| {
        for run in &runs[4 * task..runs.len().min(4 * task + 4)] {
            let table = step.spans[run.span].table as usize + run.position / BLOCK_TOKENS;
            let block = step.block_tables[table] as usize;
            for index in 0..run.rows {
                let position = run.position + index;
                // SAFETY: each row belongs to one task.
                let row = unsafe { values.range((run.row + index) * stride, width) };
                let (turned, _) = row.split_at_mut((heads + kv_heads) * dim);
                if let Some(norms) = norms {
                    norms.apply(isa, turned, (heads, dim));
                }
                if let Some(rope) = rope {
                    let angles = &rope.angles[position * rope.turned..][..rope.turned];
                    turned.chunks_exact_mut(dim).for_each(|values| lanes::turn(isa, values, angles));
                }
                for head in 0..kv_heads {
                    let key = &row[(heads + head) * dim..][..dim];
                    let value = &row[(heads + kv_heads + head) * dim..][..dim];
                    let start = places.offset(layer, block, head);
                    // SAFETY: each block belongs to one sequence, and its rows here to one task.
                    unsafe { slots.write(isa, start, (places.dim, position % BLOCK_TOKENS), (key, value)) };
                }
            }
        }
    });
}

/// Rounds a key and a value into their slot of a block.
type WritePairs = fn(Isa, (&[f32], &[f32]), usize, (&mut [u16], &mut [u16]));

/// The cache taken apart for a dispatch.
#[derive(Clone, Copy)]
enum Slots {
    F32(Scattered<f32>),
    /// bf16 or f16, and what rounds to it.
    Paired(Scattered<u16>, WritePairs),
    /// Codes, the elements in 32 bits of what they are widened to, and one over the scales of keys and values.
    E4m3(Scattered<u8>, usize, (f32, f32)),
}

impl Slots {
    /// Writes key and value of one slot of the block at `start`, whose heads have `dim` elements.
    ///
    /// # Safety
    /// No one else uses the block in this dispatch.
    unsafe fn write(&self, isa: Isa, start: usize, (dim, slot): (usize, usize), row: (&[f32], &[f32])) {
        let half = BLOCK_TOKENS * dim;
        match self {
            Slots::F32(blocks) => {
                // SAFETY: passed on.
                let block = unsafe { blocks.range(start, 2 * half) };
                if slot == 0 {
                    block.fill(0.0);
                }
                let (keys, values) = block.split_at_mut(half);
                for (element, (&key, &value)) in row.0.iter().zip(row.1).enumerate() {
                    keys[element * BLOCK_TOKENS + slot] = key;
                    values[slot * dim + element] = value;
                }
            }
            Slots::Paired(blocks, write) => {
                // SAFETY: passed on.
                let block = unsafe { blocks.range(start, 2 * half) };
                if slot == 0 {
                    block.fill(0);
                }
                let (keys, values) = block.split_at_mut(half);
                write(isa, row, slot, (keys, &mut values[slot / 2 * 2 * dim..][..2 * dim]));
            }
            Slots::E4m3(blocks, pack, inverse_scales) => {
                // SAFETY: passed on.
                let block = unsafe { blocks.range(start, 2 * half) };
                if slot == 0 {
                    block.fill(0);
                }
                let (keys, values) = block.split_at_mut(half);
                let entry = KvEntry { key: row.0, value: row.1, inverse_scales: *inverse_scales, slot };
                if *pack == 1 {
                    fp8::write_single(isa, entry, keys, &mut values[slot * dim..][..dim]);
                } else {
                    fp8::write_paired(isa, entry, keys, &mut values[slot / 2 * 2 * dim..][..2 * dim]);
                }
            }
        }
    }
}

#[inline(always)]
fn write_pairs(
    (key, value): (&[f32], &[f32]),
    slot: usize,
    (keys, values): (&mut [u16], &mut [u16]),
    bits: impl Fn(f32) -> u16,
) {
    for (pair, group) in key.as_chunks::<2>().0.iter().zip(keys.as_chunks_mut::<{ 2 * BLOCK_TOKENS }>().0) {
        group[2 * slot] = bits(pair[0]);
        group[2 * slot + 1] = bits(pair[1]);
    }
    for (&value, pair) in value.iter().zip(values.as_chunks_mut::<2>().0) {
        pair[slot % 2] = bits(value);
    }
}

#[inline(always)]
fn write_bf16_body(row: (&[f32], &[f32]), slot: usize, out: (&mut [u16], &mut [u16])) {
    write_pairs(row, slot, out, lanes::bf16_bits);
}

#[inline(always)]
fn write_f16_body(row: (&[f32], &[f32]), slot: usize, out: (&mut [u16], &mut [u16])) {
    write_pairs(row, slot, out, lanes::f16_bits);
}

lanes::versions! {
    /// Rounds a key and a value into their slot: of the keys `[dim / 2][16][2]` of a block, and of the values
    /// `[dim][2]` of the slot and its neighbour.
    fn write_bf16(row: (&[f32], &[f32]), slot: usize, out: (&mut [u16], &mut [u16])) = write_bf16_body;
}

lanes::versions! {
    /// The same in f16.
    fn write_f16(row: (&[f32], &[f32]), slot: usize, out: (&mut [u16], &mut [u16])) = write_f16_body;
}

#[inline(always)]
fn cap_body(row: &mut [f32], cap: f32) {
    lanes::cap(row, cap);
}

lanes::versions! {
    /// `cap * tanh(value / cap)` of each value.
    pub fn cap(row: &mut [f32], cap: f32) = cap_body;
}

/// Moves the chosen rows to the front. They ascend, so a row is never overwritten before it is moved.
pub fn narrow(buffer: &mut Activation, chosen: &[u32]) {
    let stride = buffer.stride;
    for (to, &from) in chosen.iter().enumerate() {
        let from = from as usize;
        let range = from * stride..(from + 1) * stride;
        match &mut buffer.rows {
            Rows::F32(rows) => rows.copy_within(range.clone(), to * stride),
            Rows::Bf16(rows) => rows.copy_within(range.clone(), to * stride),
            Rows::F16 { halves, scales } => {
                halves.copy_within(range.clone(), to * stride);
                scales[to] = scales[from];
            }
            Rows::Int8(rows) => rows.copy(range.clone(), (from, to), stride),
        }
        if let Some(rows) = &mut buffer.codes {
            rows.copy(range, (from, to), stride);
        }
    }
}
