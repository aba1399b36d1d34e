//! The ops on a CPU.
//!
//! Weights are packed once when they are loaded; a step's memory is an arena. Three precisions: f32, which is
//! the reference; bf16 weights and operands with f32 sums; int8 weights with a scale per output feature and
//! activations quantised row by row, with bf16 keys and values. The residual stream is f32 in all of them.

pub mod arena;
pub mod pack;
mod scalar;

use std::num::NonZeroUsize;

use arena::{Arena, kv_block_bytes};
use pack::{Matrix, Source, pack};

use crate::isa::Isa;
use crate::ops::{ArenaPlan, AttentionShape, Batch, Buffer, KvPlan, Ops, PlanError, QkNorm, StepError};
use crate::sampling::{SampleRow, Sampled, Scratch, sample_row};
use crate::tensor::{Aligned, HostTensor, LoadError};

/// What matrix products compute with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f32 weights, operands and cache.
    F32,
    /// bf16 weights, operands and cache; f32 sums.
    Bf16,
    /// int8 weights and operands, int32 sums; bf16 cache.
    Int8,
}

impl Precision {
    /// Adjacent columns in a packed operand: as many as make 32 bits.
    pub const fn group(self) -> usize {
        match self {
            Precision::F32 => 1,
            Precision::Bf16 => 2,
            Precision::Int8 => 4,
        }
    }
}

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
    options: CpuOptions,
    arena: Option<Arena>,
    logits: Vec<f32>,
    scores: Vec<f32>,
    scratch: Option<Scratch>,
}

/// A vector of f32.
#[derive(Debug)]
pub struct Vector(Aligned<f32>);

impl Cpu {
    /// Prepares the processor.
    pub fn new(options: CpuOptions) -> Self {
        Self { options, arena: None, logits: Vec::new(), scores: Vec::new(), scratch: None }
    }

    /// How it was made.
    pub fn options(&self) -> CpuOptions {
        self.options
    }

    fn arena(&mut self) -> &mut Arena {
        self.arena.as_mut().expect("allocate comes before any step")
    }
}

/// Two different buffers, the first to read and the second to write.
fn pair(
    buffers: &mut [arena::Activation],
    read: Buffer,
    write: Buffer,
) -> (&arena::Activation, &mut arena::Activation) {
    let [read, write] = buffers.get_disjoint_mut([read.0, write.0]).expect("two buffers of the plan");
    (read, write)
}

impl Ops for Cpu {
    type Matrix = Matrix;
    type Vector = Vector;

    fn matrix(&mut self, parts: &[HostTensor<'_>]) -> Result<Matrix, LoadError> {
        pack(&Source::Stacked(parts), self.options.precision)
    }

    fn gated_matrix(&mut self, gate: &HostTensor<'_>, up: &HostTensor<'_>) -> Result<Matrix, LoadError> {
        pack(&Source::Gated(gate, up), self.options.precision)
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
        kv_block_bytes(kv, self.options.precision)
    }

    fn allocate(&mut self, plan: ArenaPlan) -> Result<(), PlanError> {
        let arena = Arena::new(plan, self.options.precision)?;
        self.logits = vec![0.0; arena.plan.logits_rows_max * arena.plan.vocabulary];
        self.scores = vec![0.0; arena.plan.positions_max];
        self.scratch = Some(Scratch::new(arena.plan.vocabulary));
        self.arena = Some(arena);
        Ok(())
    }

    fn begin(&mut self, batch: &Batch<'_>) -> Result<(), StepError> {
        let arena = self.arena();
        batch.check(&arena.plan)?;
        arena.begin(batch);
        Ok(())
    }

    fn embed(&mut self, table: &Matrix, out: Buffer) {
        let arena = self.arena();
        let out = &mut arena.buffers[out.0];
        assert_eq!(out.width, table.columns, "width of the embedding");
        let (width, stride) = (out.width, out.stride);
        let values = out.values_mut();
        for (row, &token) in arena.step.tokens.iter().enumerate() {
            table.read_row(token as usize, &mut values[row * stride..row * stride + width]);
        }
    }

    fn rms_norm(&mut self, x: Buffer, weight: &Vector, eps: f32, out: Buffer) {
        let arena = self.arena();
        let rows = arena.step.rows;
        let (x, out) = pair(&mut arena.buffers, x, out);
        scalar::rms_norm(x, &weight.0, eps, out, rows);
    }

    fn linear(&mut self, matrix: &Matrix, bias: Option<&Vector>, x: Buffer, out: Buffer) {
        let arena = self.arena();
        let rows = arena.step.rows;
        let (x, out) = pair(&mut arena.buffers, x, out);
        let stride = out.stride;
        assert_eq!(out.width, matrix.rows, "width of a product");
        let bias = bias.map(|bias| &bias.0[..]);
        let sink = scalar::Sink { out: out.values_mut(), stride, add: false };
        scalar::linear(matrix, bias, x, rows, sink);
    }

    fn linear_add(&mut self, matrix: &Matrix, bias: Option<&Vector>, x: Buffer, residual: Buffer) {
        let arena = self.arena();
        let rows = arena.step.rows;
        let (x, out) = pair(&mut arena.buffers, x, residual);
        let stride = out.stride;
        assert_eq!(out.width, matrix.rows, "width of a product");
        let bias = bias.map(|bias| &bias.0[..]);
        let sink = scalar::Sink { out: out.values_mut(), stride, add: true };
        scalar::linear(matrix, bias, x, rows, sink);
    }

    fn linear_silu_mul(&mut self, gate_up: &Matrix, x: Buffer, out: Buffer) {
        let arena = self.arena();
        let rows = arena.step.rows;
        let (x, out) = pair(&mut arena.buffers, x, out);
        scalar::linear_silu_mul(gate_up, x, rows, out);
    }

    fn rope_cache(
        &mut self,
        layer: usize,
        qkv: Buffer,
        shape: &AttentionShape,
        norms: Option<QkNorm<'_, Vector>>,
    ) {
        let norms = norms.map(|norms| scalar::HeadNorms { q: &norms.q.0, k: &norms.k.0, eps: norms.eps });
        scalar::rope_cache(self.arena(), layer, qkv, shape, norms);
    }

    fn attention(&mut self, layer: usize, qkv: Buffer, shape: &AttentionShape, out: Buffer) {
        let arena = self.arena.as_mut().expect("allocate comes before any step");
        scalar::attention(arena, layer, (qkv, out), shape, &mut self.scores);
    }

    fn narrow(&mut self, buffers: &[Buffer]) {
        let Arena { step, buffers: activations, .. } = self.arena();
        for buffer in buffers {
            scalar::narrow(&mut activations[buffer.0], &step.logits_rows);
        }
        step.rows = step.logits_rows.len();
    }

    fn logits(&mut self, head: &Matrix, x: Buffer, out: &mut [f32]) -> Result<(), StepError> {
        let arena = self.arena();
        assert_eq!(out.len(), arena.step.rows * head.rows, "room for the logits");
        let sink = scalar::Sink { out, stride: head.rows, add: false };
        scalar::linear(head, None, &arena.buffers[x.0], arena.step.rows, sink);
        Ok(())
    }

    fn sample(
        &mut self,
        head: &Matrix,
        x: Buffer,
        rows: &[SampleRow<'_>],
        out: &mut Vec<Sampled>,
    ) -> Result<(), StepError> {
        let arena = self.arena.as_ref().expect("allocate comes before any step");
        assert_eq!(rows.len(), arena.step.rows, "one sampling row per logits row");
        assert_eq!(head.rows, arena.plan.vocabulary, "rows of the head");
        let sink = scalar::Sink { out: &mut self.logits, stride: head.rows, add: false };
        scalar::linear(head, None, &arena.buffers[x.0], rows.len(), sink);
        out.clear();
        let scratch = self.scratch.as_mut().expect("taken by allocate");
        for (row, logits) in rows.iter().zip(self.logits.chunks_exact(head.rows)) {
            out.push(sample_row(logits, row, scratch));
        }
        Ok(())
    }
}
