//! What each op records; loading, and the ends of a step.

use std::time::Duration;

use super::arena::{Arena, kv_block_bytes};
use super::plan::PlanCapacity;
use super::sampling::{Adjustments, read_result};
use super::step::{Leaving, StepCommand, Turn};
use super::{Cuda, Matrix, Vector, broken, weights};
use crate::ops::{
    ArenaPlan, AttentionShape, Batch, Buffer, HeadWork, KvPlan, Ops, PlanError, RopePlan, StepError,
};
use crate::sampling::{SampleRow, Sampled};
use crate::tensor::{HostTensor, LoadError};

/// Sizes of heads that a product can norm and turn: one or two groups of 64 features.
const HEAD_DIMS_PAIRED: [usize; 2] = [64, 128];

impl Cuda {
    /// Checks that a bias is as long as a matrix has features.
    fn bias(matrix: &Matrix, bias: Option<&Vector>) -> Option<usize> {
        assert!(bias.is_none_or(|bias| bias.len == matrix.features), "length of a bias");
        bias.map(|bias| bias.index)
    }

    /// Records a product of gates and ups.
    fn gated(&mut self, gate_up: &Matrix, x: Buffer, (out, leaving): (Buffer, Leaving)) {
        let width = self.arena().plan.buffers[out.0].width;
        let features = width.next_multiple_of(weights::PAIR_ROWS) * 2;
        assert_eq!(features, gate_up.features, "width of a gated product");
        self.step.recording.product(gate_up.index, None, x, leaving);
    }
}

impl Ops for Cuda {
    type Matrix = Matrix;
    type Vector = Vector;
    const BESIDE: bool = true;

    fn matrix(&mut self, parts: &[HostTensor<'_>]) -> Result<Matrix, LoadError> {
        self.load(|upload| upload.stacked(parts))
    }

    fn qkv_matrix(&mut self, parts: &[HostTensor<'_>], head_dim: usize) -> Result<Matrix, LoadError> {
        let paired = self.gemm.hopper && HEAD_DIMS_PAIRED.contains(&head_dim);
        self.load(|upload| if paired { upload.paired(parts, head_dim) } else { upload.stacked(parts) })
    }

    fn gated_matrix(&mut self, gate: &HostTensor<'_>, up: &HostTensor<'_>) -> Result<Matrix, LoadError> {
        self.load(|upload| upload.gated(gate, up))
    }

    fn vector(&mut self, parts: &[HostTensor<'_>]) -> Result<Vector, LoadError> {
        let (memory, len) = self.uploader()?.vector(parts)?;
        self.weights.vectors.push((memory, len));
        Ok(Vector { index: self.weights.vectors.len() - 1, len })
    }

    fn kv_block_bytes(&self, kv: &KvPlan) -> usize {
        kv_block_bytes(kv)
    }

    fn allocate(&mut self, plan: ArenaPlan) -> Result<(), PlanError> {
        // Weights are loaded: their pinned buffers are not needed any more.
        self.upload = None;
        self.adjustments = Adjustments::new(plan.vocabulary);
        let small = self.attend.is_small(&plan);
        self.arena = Some(Arena::new(&self.device, plan, small)?);
        Ok(())
    }

    fn begin(&mut self, batch: &Batch<'_>) -> Result<(), StepError> {
        self.flush()?;
        let arena = self.arena();
        batch.check(&arena.plan)?;
        let items = PlanCapacity::of(batch, arena.packing).items;
        if items > arena.items_max {
            let limit = arena.items_max;
            return Err(StepError::Batch { field: "splits of decodes", value: items, limit });
        }
        let step = &mut self.step;
        for (into, from) in [
            (&mut step.tokens, batch.tokens),
            (&mut step.block_tables, batch.block_tables),
            (&mut step.logits_rows, batch.logits_rows),
        ] {
            into.clear();
            into.extend_from_slice(from);
        }
        step.feeds.clear();
        step.feeds.extend_from_slice(batch.feeds);
        step.spans.clear();
        step.spans.extend_from_slice(batch.spans);
        Ok(())
    }

    fn weight_bytes(&self) -> u64 {
        self.weights.matrices.iter().map(|matrix| (matrix.features * matrix.stride * 2) as u64).sum()
    }

    fn embed(&mut self, table: &Matrix, out: Buffer) {
        self.step.recording.push(StepCommand::Embed { table: table.index, factor: 1.0, out, after: None });
    }

    fn rms_norm(&mut self, x: Buffer, weight: &Vector, eps: f32, out: Buffer) {
        self.step.recording.norm(x, (weight.index, eps), out);
    }

    fn linear(&mut self, matrix: &Matrix, bias: Option<&Vector>, x: Buffer, out: Buffer) {
        assert_eq!(self.arena().plan.buffers[out.0].width, matrix.features, "width of a product");
        self.step.recording.product(matrix.index, Self::bias(matrix, bias), x, Leaving::Values(out));
    }

    fn linear_add(&mut self, matrix: &Matrix, bias: Option<&Vector>, x: Buffer, residual: Buffer) {
        assert_eq!(self.arena().plan.buffers[residual.0].width, matrix.features, "width of a product");
        self.step.recording.product(matrix.index, Self::bias(matrix, bias), x, Leaving::Add(residual, None));
    }

    fn linear_silu_mul(&mut self, gate_up: &Matrix, x: Buffer, out: Buffer) {
        self.gated(gate_up, x, (out, Leaving::SiluMul(out)));
    }

    fn linear_gelu_mul(&mut self, gate_up: &Matrix, x: Buffer, out: Buffer) {
        self.gated(gate_up, x, (out, Leaving::GeluMul(out)));
    }

    fn add_rope(&mut self, rope: &RopePlan) -> Result<(), PlanError> {
        self.arena.as_mut().expect("allocate comes before any step").add_rope(&self.device, rope)
    }

    fn heads_cache(&mut self, layer: usize, qkv: Buffer, shape: &AttentionShape, work: HeadWork<'_, Vector>) {
        let HeadWork { norms, whole, rope } = work;
        let norms = norms.map(|norms| (norms.q.index, norms.k.index, norms.eps));
        let arena = self.arena.as_ref().expect("allocate comes before any step");
        let turned = rope.map_or(0, |rope| arena.ropes[rope].pairs * 2);
        let matrices = &self.weights.matrices;
        let paired = |matrix: usize| {
            let paired = matrices[matrix].paired;
            assert!(
                !paired || (turned == shape.head_dim && !whole),
                "heads that a product cannot norm and turn"
            );
            paired
        };
        let mut turn = Turn { layer, shape: *shape, norms, rope };
        if let Some(norms) = turn.norms.take_if(|_| whole) {
            self.step.recording.norm_heads(StepCommand::NormHeads { qkv, shape: *shape, norms }, paired);
        }
        self.step.recording.rope(qkv, turn, paired);
    }

    fn scale(&mut self, x: Buffer, factor: f32) {
        self.step.recording.scale(x, factor);
    }

    fn round(&mut self, x: Buffer, out: Buffer) {
        self.step.recording.write(out, StepCommand::Round { x, out });
    }

    fn norm_add(&mut self, x: Buffer, weight: &Vector, eps: f32, residual: Buffer) {
        let weight = weight.index;
        self.step.recording.write(residual, StepCommand::NormAdd { x, weight, eps, residual });
    }

    fn scaled_add(&mut self, x: Buffer, factor: f32, residual: Buffer) {
        self.step.recording.write(residual, StepCommand::ScaledAdd { x, factor, residual });
    }

    fn attention(&mut self, layer: usize, _qkv: Buffer, shape: &AttentionShape, out: Buffer) {
        assert_eq!(
            self.arena().plan.buffers[out.0].width,
            shape.heads * shape.head_dim,
            "width of the result"
        );
        self.step.recording.push(StepCommand::Attention { layer, shape: *shape, out });
    }

    fn narrow(&mut self, buffers: &[Buffer]) {
        for &buffer in buffers {
            self.step.recording.push(StepCommand::Narrow(buffer));
        }
        self.step.recording.push(StepCommand::Narrowed);
    }

    fn logits(&mut self, head: &Matrix, x: Buffer, out: &mut [f32]) -> Result<(), StepError> {
        self.step.recording.head(head.index, x);
        self.flush()?;
        assert_eq!(out.len(), self.step.logits_rows.len() * head.features, "room for the logits");
        let stride = self.arena().logits_stride;
        let mut bytes = vec![0; self.step.logits_rows.len() * stride * 4];
        self.arena().download(self.arena().logits, &mut bytes).map_err(broken)?;
        for (row, raw) in out.chunks_exact_mut(head.features).zip(bytes.chunks_exact(stride * 4)) {
            for (value, raw) in row.iter_mut().zip(raw.chunks_exact(4)) {
                *value = f32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
            }
        }
        Ok(())
    }

    fn sample(&mut self, head: &Matrix, x: Buffer, rows: &[SampleRow<'_>]) -> Result<(), StepError> {
        assert_eq!(rows.len(), self.step.logits_rows.len(), "one sampling row per logits row");
        assert_eq!(head.features, self.arena().plan.vocabulary, "rows of the head");
        if !rows.is_empty() {
            self.step.recording.head(head.index, x);
        }
        self.queue_sampled(rows)
    }

    fn collect(&mut self, out: &mut Vec<Sampled>) -> Result<Option<Duration>, StepError> {
        let arena = self.arena.as_mut().expect("allocate comes before any step");
        let flight = arena.flights.oldest();
        let busy = flight.wait().map_err(broken)?;
        let results = flight.results.words().split_at(arena.sampling.logprobs_offset / 4);
        let rows = flight.logprobs.iter().enumerate();
        out.clear();
        out.extend(rows.map(|(index, &wanted)| read_result(wanted, results, index)));
        arena.flights.collected();
        Ok(Some(busy))
    }
}
