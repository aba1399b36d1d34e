//! Memory of steps on the device: one allocation, cut up once.
//!
//! Activations, the paged cache, RoPE tables, logits and the scratch of attention and sampling. What a step uploads
//! goes from the host's side of its flight into one place, after the step before it has run. Sizes that the kernels
//! cannot do are refused here.

use std::sync::Arc;

use cudarc::driver::sys::CUtensorMap;

use super::attend::tile_rows;
use super::device::{CudaDevice, DeviceError, DeviceMemory, Pinned};
use super::flight::{FlightBytes, Flights};
use super::gemm::GROUP_FEATURES;
use super::plan::{GRAPH_ROWS_MAX, Packing, PlanCapacity, SectionLayout, splits};
use super::sampling::{ADJUSTMENT_BYTES, LOGPROBS_BYTES, PART_TOKENS, RESULT_BYTES};
use super::weights::tensor_map;
use crate::groups::cut_group;
use crate::ops::{ArenaPlan, BLOCK_TOKENS, BufferKind, KvDtype, KvPlan, PlanError, RopePlan, bound};

/// Sizes of heads that attention is compiled for.
pub const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];
/// Most query heads per key-value head.
const GROUP_MAX: usize = 64;
/// Of these, heads that a unit of decode takes: `GROUP_MAX` in `attention.cuh`.
const DECODE_GROUP_MAX: usize = 8;
/// Spans of one row that are not sampled: a prompt's chunk may end up with one row, once in a step.
const SPANS_SPARE: usize = 64;
/// Most tokens whose logits change in a step, over all rows.
const ADJUSTMENTS_MAX: usize = 1 << 22;

/// Rows of activations, and a second place for those that stay after narrowing.
#[derive(Debug, Clone)]
pub struct Activation {
    /// Elements in a row.
    pub width: usize,
    /// Elements from row to row.
    pub stride: usize,
    /// What it holds.
    pub kind: BufferKind,
    /// All rows.
    pub rows: RowPlace,
    /// The rows that want logits.
    pub narrowed: RowPlace,
}

/// Rows in memory.
#[derive(Debug, Clone)]
pub struct RowPlace {
    /// Where they start.
    pub pointer: u64,
    /// Of operands on Hopper: boxes of 8 and of 32 rows.
    pub maps: Option<[CUtensorMap; 2]>,
    /// Of values: sums of squares of each row's groups of [`GROUP_FEATURES`]; zero beyond the groups.
    pub squares: u64,
}

impl Activation {
    /// Bytes of an element.
    pub fn element_bytes(&self) -> usize {
        if self.kind == BufferKind::Values { 4 } else { 2 }
    }

    /// Sums of squares from row to row: as many as fill vectors of 4.
    pub fn squares_stride(&self) -> usize {
        self.width.div_ceil(GROUP_FEATURES).next_multiple_of(4)
    }
}

/// Everything that steps use.
#[derive(Debug)]
pub struct Arena {
    /// What was asked for.
    pub plan: ArenaPlan,
    /// By [`crate::ops::Buffer`].
    pub buffers: Vec<Activation>,
    /// Turned queries, bf16: `[rows_max][heads * head_dim]`.
    pub queries: u64,
    /// All layers' pages.
    pub cache: u64,
    /// Bytes of a layer's pages.
    pub layer_bytes: usize,
    /// Position embeddings; the plan's is the first.
    pub ropes: Vec<AngleTable>,
    /// What a step uploads.
    pub step: u64,
    /// The host's side of steps.
    pub flights: Flights,
    /// `[logits_rows_max][logits_stride]`.
    pub logits: u64,
    /// Elements from row to row of the logits: the vocabulary, rounded up to vectors.
    pub logits_stride: usize,
    /// The scratch of sampling.
    pub sampling: SamplingPlaces,
    /// Partial results of attention.
    pub partials: u64,
    /// Decode items that `partials` has room for.
    pub items_max: usize,
    /// Attention's counters, zero between launches.
    pub counters: u64,
    /// How rows are packed into tiles of attention.
    pub packing: Packing,
    memory: DeviceMemory,
}

/// Cosines, then sines, of each position: `[positions_max][2 * pairs]` in f32.
#[derive(Debug)]
pub struct AngleTable {
    /// Pairs of elements that are turned.
    pub pairs: usize,
    memory: DeviceMemory,
}

impl AngleTable {
    /// Computes a table and takes it to the device.
    fn new(device: &Arc<CudaDevice>, rope: &RopePlan, positions: usize) -> Result<Self, DeviceError> {
        let table = rope_table(rope, positions);
        let memory = DeviceMemory::zeroed(device, table.len() * 4)?;
        upload_table(device, &memory, &table)?;
        Ok(Self { pairs: rope.inverse_frequencies.len(), memory })
    }

    /// Where it begins.
    pub fn pointer(&self) -> u64 {
        self.memory.pointer()
    }
}

/// Where sampling keeps what it needs.
#[derive(Debug, Clone, Copy, Default)]
pub struct SamplingPlaces {
    /// Parts of a row.
    pub parts: usize,
    /// `PartMaximum` each.
    pub maxima: u64,
    /// One mass per part.
    pub masses: u64,
    /// One threshold per row.
    pub thresholds: u64,
    /// `SampleResult` each, and right after them `SampleLogprobs` each.
    pub results: u64,
    /// Bytes from the results to the log probabilities.
    pub logprobs_offset: usize,
    /// The token of each row, for the next step.
    pub fed: u64,
    /// `Adjustment` each.
    pub adjustments: u64,
    /// Room for these.
    pub adjustments_max: usize,
}

impl SamplingPlaces {
    /// Bytes of the results of this many rows; their log probabilities are among them when all kernels ran.
    pub fn result_bytes(&self, rows: usize, all: bool) -> usize {
        if all { self.logprobs_offset + rows * LOGPROBS_BYTES } else { rows * RESULT_BYTES }
    }
}

/// Bytes of one KV block over all layers.
pub fn kv_block_bytes(kv: &KvPlan) -> usize {
    let element = if kv.dtype == KvDtype::Fp8E4m3 { 1 } else { 2 };
    kv.layers * kv.kv_heads * 2 * BLOCK_TOKENS * kv.head_dim * element
}

fn check(plan: &ArenaPlan) -> Result<(), PlanError> {
    plan.check(1 << 17, 1 << 26)?;
    bound("heads modulo kv.kv_heads", plan.heads % plan.kv.kv_heads, 0, 0)?;
    bound("heads per key-value head", plan.heads / plan.kv.kv_heads, 1, GROUP_MAX)?;
    if !HEAD_DIMS.contains(&plan.kv.head_dim) {
        return Err(PlanError::HeadDim { value: plan.kv.head_dim, known: &HEAD_DIMS });
    }
    Ok(())
}

/// Cuts one range of memory into aligned pieces.
#[derive(Debug, Default)]
struct Cutter {
    end: usize,
}

impl Cutter {
    fn take(&mut self, bytes: usize) -> u64 {
        let start = self.end;
        self.end += bytes.next_multiple_of(256);
        start as u64
    }
}

impl Arena {
    /// Takes the memory. With `small`, that of the kernels for chips with little shared memory.
    ///
    /// # Errors
    /// When a size is out of bounds or the device has too little memory.
    pub fn new(device: &Arc<CudaDevice>, plan: ArenaPlan, small: bool) -> Result<Self, PlanError> {
        check(&plan)?;
        let packing = packing(&plan, small);
        let failed = |error: DeviceError| PlanError::Device(error.to_string());
        let mut cut = Cutter::default();
        let (kv, rows, logits_rows) = (plan.kv, plan.rows_max, plan.logits_rows_max.max(GRAPH_ROWS_MAX));
        let mut buffers: Vec<Activation> =
            plan.buffers.iter().map(|buffer| activation(&mut cut, *buffer, rows, logits_rows)).collect();
        let padded_rows = rows.max(GRAPH_ROWS_MAX);
        let queries = cut.take(padded_rows * plan.heads * kv.head_dim * 2);
        let layer_bytes = kv_block_bytes(&KvPlan { layers: 1, ..kv }) * kv.blocks;
        let cache = cut.take(layer_bytes * kv.layers);
        let spans_max = rows.min(logits_rows + SPANS_SPARE).max(GRAPH_ROWS_MAX);
        let items_max = spans_max * splits(plan.positions_max);
        let partials = cut.take(items_max * plan.heads * (kv.head_dim + 2) * 4);
        let decode_heads = kv.kv_heads * decode_parts(&plan).0;
        let counters = cut.take((spans_max * decode_heads + 1) * 4);
        let step_bytes = step_bytes(&plan, packing, spans_max, logits_rows);
        let step = cut.take(step_bytes);
        let logits_stride = plan.vocabulary.next_multiple_of(4);
        let logits = cut.take(logits_rows * logits_stride * 4);
        let mut sampling = sampling_places(&mut cut, &plan, logits_rows);
        let memory = DeviceMemory::zeroed(device, cut.end).map_err(failed)?;
        let base = memory.pointer();
        for buffer in &mut buffers {
            let rows = (rows.max(GRAPH_ROWS_MAX), logits_rows);
            place(buffer, base, rows, device.hopper).map_err(failed)?;
        }
        for place in [
            &mut sampling.maxima,
            &mut sampling.masses,
            &mut sampling.thresholds,
            &mut sampling.results,
            &mut sampling.fed,
            &mut sampling.adjustments,
        ] {
            *place += base;
        }
        let bytes = FlightBytes {
            staging: step_bytes,
            adjustments: sampling.adjustments_max * ADJUSTMENT_BYTES,
            results: logits_rows * (RESULT_BYTES + LOGPROBS_BYTES),
        };
        Ok(Self {
            buffers,
            queries: base + queries,
            cache: base + cache,
            layer_bytes,
            ropes: vec![AngleTable::new(device, &plan.rope, plan.positions_max).map_err(failed)?],
            step: base + step,
            flights: Flights::new(device, bytes).map_err(failed)?,
            logits: base + logits,
            logits_stride,
            sampling,
            partials: base + partials,
            items_max,
            counters: base + counters,
            packing,
            memory,
            plan,
        })
    }

    /// Adds a position embedding.
    ///
    /// # Errors
    /// When it turns more than a head, or the device has too little memory.
    pub fn add_rope(&mut self, device: &Arc<CudaDevice>, rope: &RopePlan) -> Result<(), PlanError> {
        rope.check(self.plan.kv.head_dim)?;
        let table = AngleTable::new(device, rope, self.plan.positions_max);
        self.ropes.push(table.map_err(|error| PlanError::Device(error.to_string()))?);
        Ok(())
    }

    /// Elements in the queries' rows.
    pub fn query_width(&self) -> usize {
        self.plan.heads * self.plan.kv.head_dim
    }

    /// Parts into which decodes cut a group, and query heads of each.
    pub fn decode_parts(&self) -> (usize, usize) {
        decode_parts(&self.plan)
    }

    /// Queues the upload of the next step's first words to the step's place.
    ///
    /// # Errors
    /// When the driver refuses it.
    pub fn upload_step(&self, words: usize) -> Result<(), DeviceError> {
        let offset = (self.step - self.memory.pointer()) as usize;
        // SAFETY: a flight's side is not written while its step is queued.
        unsafe { self.memory.upload(offset, &self.flights.next().staging.as_slice()[..words * 4]) }
    }

    /// Queues the upload of the next step's first adjustments.
    ///
    /// # Errors
    /// When the driver refuses it.
    pub fn upload_adjustments(&self, count: usize) -> Result<(), DeviceError> {
        let offset = (self.sampling.adjustments - self.memory.pointer()) as usize;
        let adjustments = self.flights.next().adjustments.as_slice();
        // SAFETY: as for the step.
        unsafe { self.memory.upload(offset, &adjustments[..count * ADJUSTMENT_BYTES]) }
    }

    /// Copies from an address inside of the arena, after all queued work.
    ///
    /// # Errors
    /// When the driver refuses it or queued work failed.
    pub fn download(&self, pointer: u64, target: &mut [u8]) -> Result<(), DeviceError> {
        self.memory.download((pointer - self.memory.pointer()) as usize, target)
    }

    /// Copies to an address inside of the arena and waits.
    ///
    /// # Errors
    /// When the driver refuses it.
    #[cfg(test)]
    pub fn write(&self, device: &CudaDevice, pointer: u64, source: &[u8]) -> Result<(), DeviceError> {
        // SAFETY: the copy has ended before this returns.
        unsafe { self.memory.upload((pointer - self.memory.pointer()) as usize, source) }?;
        device.synchronize()
    }
}

fn activation(
    cut: &mut Cutter,
    buffer: crate::ops::BufferPlan,
    rows: usize,
    logits_rows: usize,
) -> Activation {
    let nowhere = RowPlace { pointer: 0, maps: None, squares: 0 };
    let mut activation = Activation {
        width: buffer.width,
        stride: buffer.width.next_multiple_of(64),
        kind: buffer.kind,
        rows: nowhere.clone(),
        narrowed: nowhere,
    };
    let row_bytes = activation.stride * activation.element_bytes();
    let squares_bytes = if buffer.kind == BufferKind::Values { activation.squares_stride() * 4 } else { 0 };
    let mut take = |rows: usize| RowPlace {
        pointer: cut.take(rows * row_bytes),
        maps: None,
        squares: cut.take(rows * squares_bytes),
    };
    (activation.rows, activation.narrowed) = (take(rows.max(GRAPH_ROWS_MAX)), take(logits_rows));
    activation
}

/// Turns offsets into addresses, and describes operands to the copy engine of Hopper.
fn place(
    buffer: &mut Activation,
    base: u64,
    (rows, logits_rows): (usize, usize),
    hopper: bool,
) -> Result<(), DeviceError> {
    let (width, stride, kind) = (buffer.width, buffer.stride, buffer.kind);
    for (place, rows) in [(&mut buffer.rows, rows), (&mut buffer.narrowed, logits_rows)] {
        place.pointer += base;
        place.squares += base;
        if kind == BufferKind::Operand && hopper {
            let map = |box_rows| tensor_map(place.pointer, (rows, width), stride, box_rows);
            place.maps = Some([map(8)?, map(32)?]);
        }
    }
    Ok(())
}

fn packing(plan: &ArenaPlan, small: bool) -> Packing {
    let tile_rows = tile_rows(plan.kv.head_dim as u32, small) as usize;
    Packing { group: plan.heads / plan.kv.kv_heads, tile_rows }
}

fn decode_parts(plan: &ArenaPlan) -> (usize, usize) {
    cut_group(plan.heads / plan.kv.kv_heads, DECODE_GROUP_MAX)
}

fn step_bytes(plan: &ArenaPlan, packing: Packing, spans_max: usize, logits_rows: usize) -> usize {
    let eager = PlanCapacity {
        rows: plan.rows_max,
        spans: spans_max,
        decodes: spans_max,
        items: spans_max * splits(plan.positions_max),
        tiles: packing.tiles(plan.rows_max) + spans_max,
        logits_rows,
    };
    let graph = PlanCapacity::of_decodes(GRAPH_ROWS_MAX, plan.positions_max);
    let tables = spans_max * plan.positions_max.div_ceil(BLOCK_TOKENS);
    // With runs there is one more section.
    let words = |capacity| SectionLayout::new(capacity, Some(1)).words(tables);
    words(eager).max(words(graph)) * 4
}

fn sampling_places(cut: &mut Cutter, plan: &ArenaPlan, rows: usize) -> SamplingPlaces {
    let parts = plan.vocabulary.div_ceil(PART_TOKENS);
    let tokens = plan.vocabulary.min(plan.positions_max + 1024);
    let adjustments_max = (rows * tokens).min(ADJUSTMENTS_MAX);
    SamplingPlaces {
        parts,
        maxima: cut.take(rows * parts * 8),
        masses: cut.take(rows * parts * 8),
        thresholds: cut.take(rows * 8),
        results: cut.take(rows * (RESULT_BYTES + LOGPROBS_BYTES)),
        logprobs_offset: rows * RESULT_BYTES,
        fed: cut.take(rows * 4),
        adjustments: cut.take(adjustments_max * ADJUSTMENT_BYTES),
        adjustments_max,
    }
}

fn upload_table(device: &Arc<CudaDevice>, memory: &DeviceMemory, table: &[f32]) -> Result<(), DeviceError> {
    let mut pinned = Pinned::zeroed(device, table.len() * 4)?;
    for (value, word) in table.iter().zip(pinned.words_mut()) {
        *word = value.to_bits();
    }
    // SAFETY: the buffer lives until the copy has ended.
    unsafe { memory.upload(0, &pinned.as_slice()[..table.len() * 4]) }?;
    device.synchronize()
}

fn rope_table(rope: &RopePlan, positions: usize) -> Vec<f32> {
    let frequencies = &rope.inverse_frequencies;
    let mut table = Vec::with_capacity(positions * frequencies.len() * 2);
    for position in 0..positions {
        // Single precision on purpose: the model was trained with angles rounded like this.
        let angles = || frequencies.iter().map(|&frequency| position as f32 * frequency);
        table.extend(angles().map(|angle| angle.cos() * rope.amplitude));
        table.extend(angles().map(|angle| angle.sin() * rope.amplitude));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::BufferPlan;

    #[test]
    fn groups_of_up_to_64_heads_are_taken() {
        let plan = |heads| ArenaPlan {
            rows_max: 16,
            logits_rows_max: 16,
            positions_max: 64,
            vocabulary: 100,
            heads,
            buffers: vec![BufferPlan { width: 64, kind: BufferKind::Values }],
            kv: KvPlan { layers: 1, kv_heads: 2, head_dim: 64, blocks: 4, dtype: KvDtype::Operand },
            score_cap: None,
            logits_cap: None,
            rope: RopePlan { inverse_frequencies: vec![1.0; 32], amplitude: 1.0 },
        };
        assert_eq!([check(&plan(24)), check(&plan(128))], [Ok(()), Ok(())]);
        let field = "heads per key-value head";
        assert_eq!(check(&plan(130)), Err(PlanError::Size { field, value: 65, least: 1, most: 64 }));
        assert_eq!([24, 32, 128].map(|heads| decode_parts(&plan(heads))), [(2, 6), (2, 8), (8, 8)]);
    }
}
