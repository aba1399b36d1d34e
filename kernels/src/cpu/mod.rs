//! The ops on a CPU.
//!
//! Weights are packed once when they are loaded; a step's memory is an arena. Three precisions: f32, which is
//! the reference; bf16 weights with f32 sums, and operands in bf16 or f32, whichever the processor multiplies faster;
//! int8 weights with a scale per output feature and activations quantised row by row, with bf16 keys and values. The
//! residual stream is f32 in all of them. With any of them the cache may hold 8-bit floats instead, which attention
//! widens on its way to what it computes with.

mod arena;
mod attention;
mod blocks;
mod detect;
mod forms;
mod fp8;
mod greedy;
mod grouped;
mod grouped_product;
mod lanes;
mod linear;
mod measure;
mod pack;
mod rows;
mod scratch;
mod source;
mod tile;
#[cfg(target_arch = "x86_64")]
mod tile_amx;
#[cfg(target_arch = "x86_64")]
mod tile_avx2;
#[cfg(target_arch = "x86_64")]
mod tile_avx512;
#[cfg(target_arch = "x86_64")]
mod tile_fp16;
mod tile_portable;
#[cfg(target_arch = "x86_64")]
mod tile_uint4;
mod weigh;

use std::num::NonZeroUsize;
use std::time::Duration;

use arena::{Activation, Arena, LeftForms, RopeTable, kv_block_bytes};
use attention::AttentionOutput;
use forms::Forms;
use greedy::{Best, Greedy};
use linear::{Gate, Gated, Values};
pub use pack::Matrix;
use pack::{KeptCodes, Panels, keep, pack, pack_kept};
use rows::{Before, HeadNorms, Norm, ScatteredRows};
use source::{MatrixSource, PANEL};
use tile::{left_held, weights_held};

use crate::bounds::Bounds;
use crate::isa::Isa;
use crate::ops::{
    ArenaPlan, AttentionShape, Batch, Buffer, HeadWork, KvDtype, KvPlan, Ops, PlanError, QUEUED_MAX,
    RopePlan, StepError,
};
use crate::pool::{Pool, Scattered};
pub use crate::precision::Precision;
use crate::sampling::{Poisoned, SampleRow, Sampled, Scratch, sample_row};
use crate::tensor::{Aligned, HostTensor, LoadError};

/// How to run on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuOptions {
    /// What matrix products compute with.
    pub precision: Precision,
    /// Threads that work on a step, the caller's included; by default all that the process may use.
    pub threads: Option<NonZeroUsize>,
    /// Instructions to use; by default the widest that the processor has.
    pub isa: Option<Isa>,
}

impl CpuOptions {
    /// All cores, the widest instructions.
    pub fn new(precision: Precision) -> Self {
        Self { precision, threads: None, isa: None }
    }
}

/// The ops on a CPU.
#[derive(Debug)]
pub struct Cpu {
    precision: Precision,
    forms: Forms,
    /// Whether codes of a checkpoint are multiplied as they are.
    keeps_codes: bool,
    /// Whether a matrix reads rows in 8 bits.
    reads_codes: bool,
    /// Bytes of all matrices.
    weight_bytes: u64,
    /// `[threads][a pair of panels]`: codes of 4 bits on their way to a product.
    widened: Aligned<i8>,
    pool: Pool,
    arena: Option<Arena>,
    logits: Aligned<f32>,
    sampling: Vec<Scratch>,
    /// `[threads][logits_rows_max]`
    greedy: Vec<Best>,
    /// Choices of the queued steps, oldest first.
    chosen: [Vec<Sampled>; QUEUED_MAX],
    queued: usize,
    /// Tokens of the newest choices.
    fed: Vec<u32>,
}

/// A vector of f32.
#[derive(Debug)]
pub struct Vector(Aligned<f32>);

/// The processor lacks the instructions that were asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this processor has no {wanted}; the widest that it has is {widest}")]
pub struct Unsupported {
    /// What was asked for.
    pub wanted: Isa,
    /// What there is.
    pub widest: Isa,
}

impl Cpu {
    /// Starts the threads and chooses the instructions.
    ///
    /// # Errors
    /// When instructions were asked for that the processor lacks.
    pub fn new(options: CpuOptions) -> Result<Self, Unsupported> {
        let isa = options.isa.unwrap_or_else(Isa::detect);
        if !isa.is_available() {
            return Err(Unsupported { wanted: isa, widest: Isa::detect() });
        }
        let forms = Forms::new(isa, options.precision, KvDtype::Operand);
        Ok(Self {
            precision: options.precision,
            forms,
            keeps_codes: options.precision != Precision::F32,
            reads_codes: false,
            weight_bytes: 0,
            widened: Aligned::zeroed(0),
            pool: Pool::new(options.threads),
            arena: None,
            logits: Aligned::zeroed(0),
            sampling: Vec::new(),
            greedy: Vec::new(),
            chosen: Default::default(),
            queued: 0,
            fed: Vec::new(),
        })
    }

    /// Says whether codes of a checkpoint are multiplied as they are, with rows in 8 bits. They are, unless the
    /// precision is f32, the reference; otherwise their values are packed like any others.
    pub fn keep_codes(&mut self, keeps: bool) {
        self.keeps_codes = keeps;
    }

    /// What matrix products compute with.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Instructions in use.
    pub fn isa(&self) -> Isa {
        self.forms.isa
    }

    /// What left operands of weights are held in.
    fn left(&self) -> LeftForms {
        LeftForms { held: left_held(self.forms.isa, self.precision), codes: self.reads_codes }
    }

    fn pack(&mut self, source: &MatrixSource<'_, '_>) -> Result<Matrix, LoadError> {
        let kept: Option<KeptCodes> = if self.keeps_codes { keep(source) } else { None };
        let Some(kept) = kept else {
            let matrix = pack(&mut self.pool, source, weights_held(self.forms.isa, self.precision))?;
            self.weight_bytes += matrix.bytes() as u64;
            return Ok(matrix);
        };
        self.reads_codes = true;
        let matrix = pack_kept(&mut self.pool, source, kept)?;
        self.weight_bytes += matrix.bytes() as u64;
        let len = 2 * PANEL * matrix.columns_padded;
        if matches!(matrix.panels, Panels::Grouped(_)) && self.forms.widened_len < len {
            self.widened = Aligned::zeroed(len * self.pool.threads());
            self.widen_in(len);
        }
        Ok(matrix)
    }

    /// Tells the forms where codes are widened.
    fn widen_in(&mut self, len: usize) {
        self.forms.widened = Scattered::new(&mut self.widened);
        self.forms.widened_len = len;
    }

    /// Threads that work on a step.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Measures memory and tile product on all threads. Takes about a second; no step may be under way.
    pub fn measure(&mut self) -> Bounds {
        measure::bounds(&mut self.pool, self.forms.isa, self.precision)
    }

    fn parts(&mut self) -> (&mut Pool, Forms, &mut Arena) {
        (&mut self.pool, self.forms, self.arena.as_mut().expect("allocate comes before any step"))
    }

    /// Product of operand rows with a matrix, into values.
    fn values_product(
        &mut self,
        matrix: &Matrix,
        bias: Option<&Vector>,
        (x, out): (Buffer, Buffer),
        add: bool,
    ) {
        let (pool, forms, arena) = self.parts();
        let rows = arena.step.rows;
        let (x, out) = pair(&mut arena.buffers, x, out);
        assert_eq!(out.width, matrix.rows, "width of a product");
        let bias = bias.map(|bias| &bias.0[..]);
        assert!(bias.is_none_or(|bias| bias.len() == matrix.rows), "length of a bias");
        let stride = out.stride;
        let out = Scattered::new(out.values_mut());
        let values = Values { isa: forms.isa, out, stride, features: matrix.rows, add, bias };
        linear::product(pool, forms, matrix, (x, rows), &values);
    }

    /// Product of operand rows with gate and up projection, into an operand.
    fn gated_product(&mut self, gate_up: &Matrix, gate: Gate, (x, out): (Buffer, Buffer)) {
        let (pool, forms, arena) = self.parts();
        let rows = arena.step.rows;
        let (x, out) = pair(&mut arena.buffers, x, out);
        assert_eq!(out.width.next_multiple_of(PANEL) * 2, gate_up.rows, "width of a gated product");
        let store = if out.is_scaled() {
            ScatteredRows::F32(Scattered::new(&mut arena.unscaled))
        } else {
            ScatteredRows::new(out)
        };
        let gated = Gated { gate, isa: forms.isa, store, stride: out.stride };
        linear::product(pool, forms, gate_up, (x, rows), &gated);
        if out.is_scaled() {
            rows::scale(pool, forms.isa, &arena.unscaled, out, rows);
        }
    }

    /// Adds a branch to the residual stream.
    fn add(&mut self, x: Buffer, before: Before<'_>, residual: Buffer) {
        let (pool, forms, arena) = self.parts();
        let two = arena.buffers.get_disjoint_mut([x.0, residual.0]).expect("two buffers of the plan");
        let [x, residual] = two;
        rows::add(pool, forms.isa, (x, residual), before, arena.step.rows);
    }

    /// Chooses the next token of each narrowed row into the newest of the queued choices.
    fn choose(&mut self, head: &Matrix, x: Buffer, rows: &[SampleRow<'_>]) {
        let Self { pool, forms, arena, logits, sampling, greedy, chosen, queued, fed, .. } = self;
        let (arena, out) = (arena.as_ref().expect("allocate comes before any step"), &mut chosen[*queued]);
        assert_eq!(rows.len(), arena.step.rows, "one sampling row per logits row");
        assert_eq!(head.rows, arena.plan.vocabulary, "rows of the head");
        let (vocabulary, x) = (head.rows, (&arena.buffers[x.0], rows.len()));
        let cap = arena.plan.logits_cap;
        // Two logits may be one once they are capped, so that the greatest is looked for behind the cap.
        if cap.is_none() && rows.iter().all(SampleRow::is_plain_argmax) {
            let best = &mut greedy[..pool.threads() * rows.len()];
            linear::product(pool, *forms, head, x, &Greedy::new(forms.isa, best, rows.len(), vocabulary));
            let seen = |row: usize| best.iter().skip(row).step_by(rows.len());
            out.extend((0..rows.len()).map(|row| greedy::choose(seen(row))));
        } else {
            logits_product(pool, *forms, head, x, (logits, cap));
            out.resize(rows.len(), Err(Poisoned));
            let (sampled, scratch) = (Scattered::new(out), Scattered::new(sampling));
            let logits = &logits[..];
            pool.run(rows.len(), |thread, row| {
                let logits = &logits[row * vocabulary..][..vocabulary];
                // SAFETY: each row belongs to one task, each scratch to one thread.
                unsafe {
                    sampled.range(row, 1)[0] =
                        sample_row(logits, &rows[row], &mut scratch.range(thread, 1)[0]);
                }
            });
        }
        for (fed, choice) in fed.iter_mut().zip(out) {
            *fed = choice.as_ref().map_or(0, |choice| choice.token);
        }
    }
}

/// Two different buffers, the first to read and the second to write.
fn pair(buffers: &mut [Activation], read: Buffer, write: Buffer) -> (&Activation, &mut Activation) {
    let [read, write] = buffers.get_disjoint_mut([read.0, write.0]).expect("two buffers of the plan");
    (read, write)
}

/// Writes logits of all rows of `x`.
fn logits_product(
    pool: &mut Pool,
    forms: Forms,
    head: &Matrix,
    x: (&Activation, usize),
    (out, cap): (&mut [f32], Option<f32>),
) {
    let (out, features) = (Scattered::new(out), head.rows);
    let values = Values { isa: forms.isa, out, stride: features, features, add: false, bias: None };
    linear::product(pool, forms, head, x, &values);
    if let Some(cap) = cap {
        pool.run(x.1, |_, row| {
            // SAFETY: each row belongs to one task.
            let row = unsafe { values.out.range(row * features, features) };
            rows::cap(forms.isa, row, cap);
        });
    }
}

impl Ops for Cpu {
    type Matrix = Matrix;
    type Vector = Vector;
    const BESIDE: bool = false;

    fn matrix(&mut self, parts: &[HostTensor<'_>]) -> Result<Matrix, LoadError> {
        self.pack(&MatrixSource::Stacked(parts))
    }

    fn qkv_matrix(&mut self, parts: &[HostTensor<'_>], _head_dim: usize) -> Result<Matrix, LoadError> {
        self.matrix(parts)
    }

    fn gated_matrix(&mut self, gate: &HostTensor<'_>, up: &HostTensor<'_>) -> Result<Matrix, LoadError> {
        self.pack(&MatrixSource::Gated(gate, up))
    }

    fn vector(&mut self, parts: &[HostTensor<'_>]) -> Result<Vector, LoadError> {
        let lens = parts.iter().map(HostTensor::vector_len).collect::<Result<Vec<_>, _>>()?;
        if lens.is_empty() {
            return Err(LoadError::Empty);
        }
        let mut vector = Aligned::zeroed(lens.iter().sum());
        let mut first = 0;
        for (part, len) in parts.iter().zip(lens) {
            part.read_f32(0, &mut vector[first..first + len]);
            first += len;
        }
        Ok(Vector(vector))
    }

    fn kv_block_bytes(&self, kv: &KvPlan) -> usize {
        kv_block_bytes(kv, self.precision)
    }

    fn allocate(&mut self, plan: ArenaPlan) -> Result<(), PlanError> {
        let forms = Forms::new(self.forms.isa, self.precision, plan.kv.dtype);
        let arena = Arena::new(plan, (self.left(), forms.cache), self.pool.threads())?;
        let widened = self.forms.widened_len;
        self.forms = forms;
        self.widen_in(widened);
        self.logits = Aligned::zeroed(arena.plan.logits_rows_max * arena.plan.vocabulary);
        self.sampling = (0..self.pool.threads()).map(|_| Scratch::new(arena.plan.vocabulary)).collect();
        self.greedy = vec![Best::NOTHING; self.pool.threads() * arena.plan.logits_rows_max];
        self.fed = vec![0; arena.plan.logits_rows_max];
        self.arena = Some(arena);
        Ok(())
    }

    fn begin(&mut self, batch: &Batch<'_>) -> Result<(), StepError> {
        let arena = self.arena.as_mut().expect("allocate comes before any step");
        batch.check(&arena.plan)?;
        arena.begin(batch);
        for feed in batch.feeds {
            arena.step.tokens[feed.row as usize] = self.fed[feed.choice as usize];
        }
        Ok(())
    }

    fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    fn embed(&mut self, table: &Matrix, out: Buffer) {
        let (pool, _, arena) = self.parts();
        rows::embed(pool, table, &arena.step.tokens, &mut arena.buffers[out.0]);
    }

    fn rms_norm(&mut self, x: Buffer, weight: &Vector, eps: f32, out: Buffer) {
        let (pool, forms, arena) = self.parts();
        let rows = arena.step.rows;
        let (x, out) = pair(&mut arena.buffers, x, out);
        let norm = Norm { x, out, scratch: &mut arena.unscaled, rows };
        rows::rms_norm(pool, forms.isa, norm, (&weight.0, eps));
    }

    fn linear(&mut self, matrix: &Matrix, bias: Option<&Vector>, x: Buffer, out: Buffer) {
        self.values_product(matrix, bias, (x, out), false);
    }

    fn linear_add(&mut self, matrix: &Matrix, bias: Option<&Vector>, x: Buffer, residual: Buffer) {
        self.values_product(matrix, bias, (x, residual), true);
    }

    fn linear_silu_mul(&mut self, gate_up: &Matrix, x: Buffer, out: Buffer) {
        self.gated_product(gate_up, Gate::Silu, (x, out));
    }

    fn linear_gelu_mul(&mut self, gate_up: &Matrix, x: Buffer, out: Buffer) {
        self.gated_product(gate_up, Gate::Gelu, (x, out));
    }

    fn add_rope(&mut self, rope: &RopePlan) -> Result<(), PlanError> {
        let (_, _, arena) = self.parts();
        rope.check(arena.plan.kv.head_dim)?;
        arena.ropes.push(RopeTable::new(rope, arena.plan.positions_max));
        Ok(())
    }

    fn heads_cache(&mut self, layer: usize, qkv: Buffer, shape: &AttentionShape, work: HeadWork<'_, Vector>) {
        let (pool, forms, arena) = self.parts();
        let HeadWork { norms, whole, rope } = work;
        let norms = norms.map(|norms| HeadNorms { q: &norms.q.0, k: &norms.k.0, eps: norms.eps, whole });
        rows::rope_cache(pool, forms.isa, arena, (layer, qkv), (shape, norms, rope));
    }

    fn scale(&mut self, x: Buffer, factor: f32) {
        let (pool, _, arena) = self.parts();
        rows::multiply(pool, &mut arena.buffers[x.0], factor, arena.step.rows);
    }

    fn round(&mut self, x: Buffer, out: Buffer) {
        let (pool, forms, arena) = self.parts();
        rows::round(pool, forms.isa, pair(&mut arena.buffers, x, out), arena.step.rows);
    }

    fn norm_add(&mut self, x: Buffer, weight: &Vector, eps: f32, residual: Buffer) {
        self.add(x, Before::Norm(&weight.0, eps), residual);
    }

    fn scaled_add(&mut self, x: Buffer, factor: f32, residual: Buffer) {
        self.add(x, Before::Times(factor), residual);
    }

    fn attention(&mut self, layer: usize, qkv: Buffer, shape: &AttentionShape, out: Buffer) {
        let (pool, forms, arena) = self.parts();
        assert!(qkv != out, "attention reads and writes two buffers");
        let activation = &mut arena.buffers[out.0];
        assert_eq!(activation.width, shape.heads * shape.head_dim, "width of attention's result");
        let scaled = activation.is_scaled();
        let stride = activation.stride;
        let store = if scaled {
            ScatteredRows::F32(Scattered::new(&mut arena.unscaled))
        } else {
            ScatteredRows::new(activation)
        };
        attention::attention(pool, forms, arena, (layer, qkv, AttentionOutput { store, stride }), shape);
        if scaled {
            let rows = arena.step.rows;
            rows::scale(pool, forms.isa, &arena.unscaled, &mut arena.buffers[out.0], rows);
        }
    }

    fn narrow(&mut self, buffers: &[Buffer]) {
        let (_, _, arena) = self.parts();
        for buffer in buffers {
            rows::narrow(&mut arena.buffers[buffer.0], &arena.step.logits_rows);
        }
        arena.step.rows = arena.step.logits_rows.len();
    }

    fn logits(&mut self, head: &Matrix, x: Buffer, out: &mut [f32]) -> Result<(), StepError> {
        let (pool, forms, arena) = self.parts();
        assert_eq!(out.len(), arena.step.rows * head.rows, "room for the logits");
        let cap = arena.plan.logits_cap;
        logits_product(pool, forms, head, (&arena.buffers[x.0], arena.step.rows), (out, cap));
        Ok(())
    }

    fn sample(&mut self, head: &Matrix, x: Buffer, rows: &[SampleRow<'_>]) -> Result<(), StepError> {
        assert!(self.queued < QUEUED_MAX, "a step is collected before a third one is queued");
        if !rows.is_empty() {
            self.choose(head, x, rows);
        }
        self.queued += 1;
        Ok(())
    }

    fn collect(&mut self, out: &mut Vec<Sampled>) -> Result<Option<Duration>, StepError> {
        assert!(self.queued > 0, "a step is queued before it is collected");
        out.clear();
        std::mem::swap(out, &mut self.chosen[0]);
        self.chosen.rotate_left(1);
        self.queued -= 1;
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
