//! Memory of a step: activation buffers, the paged cache, RoPE tables, the batch at hand and its runs.
//!
//! Everything is taken when the arena is made and nothing grows afterwards.

use std::ops::Range;

use super::scratch::{AttentionScratch, HEAD_DIM_MAX, Widened};
use super::tile::{Held, LANES};
use crate::ops::{
    ArenaPlan, BLOCK_TOKENS, Batch, BufferKind, KvDtype, KvPlan, PlanError, RopePlan, RowSpan, bound,
};
use crate::precision::Precision;
use crate::tensor::Aligned;

/// Rows of activations.
#[derive(Debug)]
pub struct Activation {
    /// Elements in a row.
    pub width: usize,
    /// Elements from one row to the next.
    pub stride: usize,
    /// The rows.
    pub rows: Rows,
    /// The same in 8 bits, where some matrices read those and others do not.
    pub codes: Option<CodeRows>,
}

/// Rows in one of the forms that kernels read.
#[derive(Debug)]
pub enum Rows {
    /// Values, and operands in f32 (of f32 weights, and of bf16 weights that are widened).
    F32(Aligned<f32>),
    /// Operands in bf16, as bits.
    Bf16(Aligned<u16>),
    /// Operands in f16: value = half * scale of the row, a power of two.
    F16 {
        /// Bits.
        halves: Aligned<u16>,
        /// One per row.
        scales: Aligned<f32>,
    },
    /// Operands in 8 bits.
    Int8(CodeRows),
}

/// Rows in 8 bits: value = (code - 128) * scale of the row.
#[derive(Debug)]
pub struct CodeRows {
    /// Codes.
    pub codes: Aligned<u8>,
    /// One per row.
    pub scales: Aligned<f32>,
}

impl CodeRows {
    fn zeroed(elements: usize, rows: usize) -> Self {
        Self { codes: Aligned::zeroed(elements), scales: Aligned::zeroed(rows) }
    }

    /// Copies the codes at `range`, those of row `from`, into row `to`.
    pub fn copy(&mut self, range: Range<usize>, (from, to): (usize, usize), stride: usize) {
        self.codes.copy_within(range, to * stride);
        self.scales[to] = self.scales[from];
    }
}

/// What left operands are held in.
#[derive(Debug, Clone, Copy)]
pub struct LeftForms {
    /// For most matrices.
    pub held: Held,
    /// Some matrices read 8 bits beside that.
    pub codes: bool,
}

/// The paged keys and values. A block of one head holds 16 keys as `[dim / 2][16][2]` and 16 values as
/// `[8][dim][2]` in bf16, or `[dim][16]` and `[16][dim]` in f32: both are right-hand operands of a product.
/// `dim` is the head's size rounded up to whole lanes; what is beyond the head is zero. Codes of 8 bits lie in the
/// order of what they are widened to.
#[derive(Debug)]
pub struct Cache {
    /// Sizes.
    pub plan: KvPlan,
    /// Elements in 32 bits of what attention multiplies: 1 of f32, 2 of bf16 and f16.
    pub pack: usize,
    /// `[layers][blocks][kv_heads][2 (keys, values)][16 * dim]`
    pub blocks: CacheBlocks,
}

/// The cache's memory.
#[derive(Debug)]
pub enum CacheBlocks {
    /// With f32 operands.
    F32(Aligned<f32>),
    /// With bf16 and int8 weights; bf16 bits.
    Bf16(Aligned<u16>),
    /// The same where halves are multiplied; f16 bits.
    F16(Aligned<u16>),
    /// With any operands, where the plan asks for it; codes.
    E4m3(Aligned<u8>),
}

/// Where things lie in the cache.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    blocks: usize,
    kv_heads: usize,
    /// Elements of a head, rounded up to whole lanes.
    pub dim: usize,
}

impl Places {
    /// Element where the keys of a block start; the values follow at `16 * dim`.
    pub fn offset(&self, layer: usize, block: usize, head: usize) -> usize {
        ((layer * self.blocks + block) * self.kv_heads + head) * 2 * BLOCK_TOKENS * self.dim
    }
}

impl Cache {
    fn new(plan: KvPlan, held: Held) -> Self {
        let elements = kv_block_elements(&plan) * plan.blocks;
        let blocks = match (plan.dtype, held) {
            (KvDtype::Fp8E4m3, _) => CacheBlocks::E4m3(Aligned::zeroed(elements)),
            (KvDtype::Operand, Held::F32) => CacheBlocks::F32(Aligned::zeroed(elements)),
            (KvDtype::Operand, Held::F16) => CacheBlocks::F16(Aligned::zeroed(elements)),
            (KvDtype::Operand, _) => CacheBlocks::Bf16(Aligned::zeroed(elements)),
        };
        Self { plan, pack: held.group(), blocks }
    }

    /// Room for a thread's tile of widened codes, if there are any to widen.
    fn widened(&self) -> Widened {
        match (&self.blocks, self.pack) {
            (CacheBlocks::E4m3(_), 1) => Widened::f32(self.places().dim),
            (CacheBlocks::E4m3(_), _) => Widened::bf16(self.places().dim),
            _ => Widened::Nothing,
        }
    }

    /// Where things lie.
    pub fn places(&self) -> Places {
        Places {
            blocks: self.plan.blocks,
            kv_heads: self.plan.kv_heads,
            dim: self.plan.head_dim.next_multiple_of(LANES),
        }
    }
}

/// The batch of the step at hand, copied so that ops need no borrow of the engine's.
#[derive(Debug, Default)]
pub struct Step {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Sequences.
    pub spans: Vec<RowSpan>,
    /// Block tables.
    pub block_tables: Vec<u32>,
    /// Rows that want logits.
    pub logits_rows: Vec<u32>,
    /// Rows that ops work on now.
    pub rows: usize,
}

/// Rows of one sequence inside one aligned run of positions.
#[derive(Debug, Clone, Copy)]
pub struct RowRun {
    /// Index of the span.
    pub span: usize,
    /// First row.
    pub row: usize,
    /// Position of that row.
    pub position: usize,
    /// Rows.
    pub rows: usize,
}

/// Cuts spans at the multiples of `size` positions. Clears `runs` first.
pub fn cut(spans: &[RowSpan], size: usize, runs: &mut Vec<RowRun>) {
    runs.clear();
    for (index, span) in spans.iter().enumerate() {
        let (mut row, mut position) = (span.first_row as usize, span.first_position() as usize);
        let end = span.context as usize;
        while position < end {
            let rows = (size - position % size).min(end - position);
            runs.push(RowRun { span: index, row, position, rows });
            row += rows;
            position += rows;
        }
    }
}

/// All memory of a step.
#[derive(Debug)]
pub struct Arena {
    /// What was asked for.
    pub plan: ArenaPlan,
    /// Activations, by [`crate::ops::Buffer`].
    pub buffers: Vec<Activation>,
    /// Keys and values.
    pub cache: Cache,
    /// Position embeddings; the first is the plan's.
    pub ropes: Vec<RopeTable>,
    /// The batch.
    pub step: Step,
    /// The batch's rows cut into runs, by the op at hand.
    pub runs: Vec<RowRun>,
    /// Attention's memory, one per thread.
    pub attention: Vec<Box<AttentionScratch>>,
    /// `[rows_max][stride of the widest operand]`: rows that are complete before they are scaled.
    pub unscaled: Aligned<f32>,
}

fn kv_block_elements(kv: &KvPlan) -> usize {
    kv.layers * kv.kv_heads * 2 * BLOCK_TOKENS * kv.head_dim.next_multiple_of(LANES)
}

/// Bytes of one KV block over all layers.
pub fn kv_block_bytes(kv: &KvPlan, precision: Precision) -> usize {
    let element = match (kv.dtype, precision) {
        (KvDtype::Fp8E4m3, _) => 1,
        (KvDtype::Operand, Precision::F32) => 4,
        (KvDtype::Operand, _) => 2,
    };
    kv_block_elements(kv) * element
}

fn check(plan: &ArenaPlan) -> Result<(), PlanError> {
    plan.check(1 << 20, 1 << 28)?;
    bound("kv.head_dim", plan.kv.head_dim, 2, HEAD_DIM_MAX)?;
    bound("kv.head_dim modulo 2", plan.kv.head_dim % 2, 0, 0)
}

impl Arena {
    /// Takes the memory, for what the left operands of weights, and the cache, are held in.
    ///
    /// # Errors
    /// When a size is out of bounds.
    pub fn new(plan: ArenaPlan, (left, cache): (LeftForms, Held), threads: usize) -> Result<Self, PlanError> {
        check(&plan)?;
        let buffers: Vec<Activation> = plan
            .buffers
            .iter()
            .map(|buffer| Activation::new(buffer.width, buffer.kind, plan.rows_max, left))
            .collect();
        let cache = Cache::new(plan.kv, cache);
        let ropes = vec![RopeTable::new(&plan.rope, plan.positions_max)];
        let step = Step {
            tokens: Vec::with_capacity(plan.rows_max),
            spans: Vec::with_capacity(plan.rows_max),
            block_tables: Vec::with_capacity(plan.rows_max),
            logits_rows: Vec::with_capacity(plan.logits_rows_max),
            rows: 0,
        };
        let scaled = buffers.iter().filter(|buffer| buffer.is_scaled());
        let stride = scaled.map(|buffer| buffer.stride).max().unwrap_or(0);
        let attention = (0..threads).map(|_| AttentionScratch::new(cache.widened())).collect();
        Ok(Self {
            buffers,
            cache,
            ropes,
            step,
            runs: Vec::with_capacity(plan.rows_max),
            attention,
            unscaled: Aligned::zeroed(plan.rows_max * stride),
            plan,
        })
    }

    /// Copies a checked batch.
    pub fn begin(&mut self, batch: &Batch<'_>) {
        let step = &mut self.step;
        step.tokens.clear();
        step.tokens.extend_from_slice(batch.tokens);
        step.spans.clear();
        step.spans.extend_from_slice(batch.spans);
        step.block_tables.clear();
        step.block_tables.extend_from_slice(batch.block_tables);
        step.logits_rows.clear();
        step.logits_rows.extend_from_slice(batch.logits_rows);
        step.rows = batch.tokens.len();
    }
}

impl Activation {
    fn new(width: usize, kind: BufferKind, rows_max: usize, left: LeftForms) -> Self {
        let stride = width.next_multiple_of(LANES);
        let elements = rows_max * stride;
        let codes = kind == BufferKind::Operand && left.codes && left.held != Held::Int8;
        let rows = match (kind, left.held) {
            (BufferKind::Values, _) | (_, Held::F32) => Rows::F32(Aligned::zeroed(elements)),
            (_, Held::Bf16) => Rows::Bf16(Aligned::zeroed(elements)),
            (_, Held::F16) => {
                Rows::F16 { halves: Aligned::zeroed(elements), scales: Aligned::zeroed(rows_max) }
            }
            (_, Held::Int8) => Rows::Int8(CodeRows::zeroed(elements, rows_max)),
        };
        Self { width, stride, rows, codes: codes.then(|| CodeRows::zeroed(elements, rows_max)) }
    }

    /// Whether each row has a scale, so that it has to be complete before it is written.
    pub fn is_scaled(&self) -> bool {
        self.codes.is_some() || matches!(self.rows, Rows::F16 { .. } | Rows::Int8(_))
    }

    /// The rows in 8 bits.
    ///
    /// # Panics
    /// When the buffer has none.
    pub fn codes(&self) -> &CodeRows {
        match (&self.codes, &self.rows) {
            (Some(codes), _) | (None, Rows::Int8(codes)) => codes,
            _ => panic!("the buffer holds no operands in 8 bits"),
        }
    }

    /// The rows as f32.
    ///
    /// # Panics
    /// When the buffer holds operands of another form.
    pub fn values(&self) -> &[f32] {
        match &self.rows {
            Rows::F32(rows) => rows,
            _ => panic!("the buffer holds operands where values are needed"),
        }
    }

    /// As [`Activation::values`], to write.
    pub fn values_mut(&mut self) -> &mut [f32] {
        match &mut self.rows {
            Rows::F32(rows) => rows,
            _ => panic!("the buffer holds operands where values are needed"),
        }
    }
}

/// Cosines and sines of a position embedding.
#[derive(Debug)]
pub struct RopeTable {
    /// Elements of a head that are turned.
    pub turned: usize,
    /// `[positions][2 (cosines, sines)][turned / 2]`
    pub angles: Aligned<f32>,
}

impl RopeTable {
    /// Computes the table.
    pub fn new(rope: &RopePlan, positions: usize) -> Self {
        let frequencies = &rope.inverse_frequencies;
        let turned = frequencies.len() * 2;
        let mut angles = Aligned::zeroed(positions * turned);
        if turned == 0 {
            return Self { turned, angles };
        }
        for (position, row) in angles.chunks_exact_mut(turned).enumerate() {
            let (cosines, sines) = row.split_at_mut(frequencies.len());
            for (index, &frequency) in frequencies.iter().enumerate() {
                // Single precision on purpose: the model was trained with angles rounded like this.
                let angle = position as f32 * frequency;
                cosines[index] = angle.cos() * rope.amplitude;
                sines[index] = angle.sin() * rope.amplitude;
            }
        }
        Self { turned, angles }
    }
}
