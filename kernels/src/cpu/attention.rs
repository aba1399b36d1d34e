//! Paged causal attention, streamed over fixed tiles of the cache (online softmax: Milakov and Gimelshein 2018;
//! tiling: FlashAttention, Dao et al. 2022).
//!
//! The query heads that share a key-value head, for a few neighbouring rows, are the rows of the tile product;
//! the blocks of the cache already lie as its panels. Tiles start at multiples of [`TILE_TOKENS`] positions and
//! end with the block that holds the row itself, and rows are grouped inside aligned runs of positions that lie
//! in one block: a row goes through the same operations alone, in a chunk and in any batch.

use super::arena::{Arena, Cache, CacheBlocks, Places};
use super::lanes::{self, versions};
use super::linear::Forms;
use super::rows::{Run, Store, cut};
use super::tile::{LANES, Sums, TILE_PANELS, TILE_ROWS, TILE_SEGMENTS, Tile, WIDE_TILE_ROWS};
use crate::isa::Isa;
use crate::ops::{AttentionShape, BLOCK_TOKENS, Buffer};
use crate::pool::{Pool, Scattered};

/// Positions of a tile.
const TILE_TOKENS: usize = 64;
/// Blocks of a tile.
const TILE_BLOCKS: usize = TILE_TOKENS / BLOCK_TOKENS;
/// Most elements of a head.
pub const HEAD_DIM_MAX: usize = 256;
/// Most query heads that may share a key-value head.
pub const GROUP_MAX: usize = TILE_ROWS;
/// Runs per thread from which on tasks are whole runs: enough to even out their different lengths.
const RUNS_PER_THREAD: usize = 8;
const HEAD_PANELS: usize = HEAD_DIM_MAX / LANES;

/// A thread's memory for attention.
#[repr(C, align(64))]
pub struct Scratch {
    /// Queries as a left operand, `[rows][head_dim]`.
    queries: [[u32; HEAD_DIM_MAX]; TILE_ROWS],
    /// Weights as a left operand, `[rows][TILE_TOKENS]`.
    weights: [[u32; TILE_TOKENS]; TILE_ROWS],
    scores: [[[f32; LANES]; TILE_BLOCKS]; TILE_ROWS],
    /// Sums of weighted values, in chunks of panels, each `[rows][panels of the chunk]`.
    results: [[f32; LANES]; TILE_ROWS * HEAD_PANELS],
    sums: Sums,
    maxima: [f32; TILE_ROWS],
    totals: [f32; TILE_ROWS],
}

impl std::fmt::Debug for Scratch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Scratch")
    }
}

impl Scratch {
    /// All zero, on the heap.
    pub fn new() -> Box<Self> {
        Box::new(Self {
            queries: [[0; HEAD_DIM_MAX]; TILE_ROWS],
            weights: [[0; TILE_TOKENS]; TILE_ROWS],
            scores: [[[0.0; LANES]; TILE_BLOCKS]; TILE_ROWS],
            results: [[0.0; LANES]; TILE_ROWS * HEAD_PANELS],
            sums: Sums::ZERO,
            maxima: [0.0; TILE_ROWS],
            totals: [0.0; TILE_ROWS],
        })
    }
}

/// Where results go: an operand, or values that are quantised afterwards.
#[derive(Clone, Copy)]
pub struct Target {
    /// The rows.
    pub store: Store,
    /// Elements from row to row.
    pub stride: usize,
}

/// One task: the queries of a run that share a key-value head.
struct Task<'a> {
    forms: Forms,
    shape: &'a AttentionShape,
    run: Run,
    table: &'a [u32],
    layer: usize,
    head: usize,
    cache: &'a Cache,
}

/// Rows of a run: as many as fit into a tile with all heads of the group, a power of two below a block's size.
fn rows_per_run(group: usize) -> usize {
    let mut rows = TILE_ROWS / group;
    while !rows.is_power_of_two() {
        rows -= 1;
    }
    rows
}

/// Attention of all rows of the step.
pub fn attention(
    pool: &mut Pool,
    forms: Forms,
    arena: &mut Arena,
    (layer, qkv, target): (usize, Buffer, Target),
    shape: &AttentionShape,
) {
    let Arena { buffers, cache, step, runs, attention: scratch, .. } = arena;
    let group = shape.heads / shape.kv_heads;
    assert!(group * shape.kv_heads == shape.heads, "query heads are a multiple of key-value heads");
    assert!(group <= GROUP_MAX, "{group} query heads share a key-value head; the limit is {GROUP_MAX}");
    assert_eq!((shape.kv_heads, shape.head_dim), (cache.plan.kv_heads, cache.plan.head_dim), "cache shape");
    cut(&step.spans, rows_per_run(group), runs);
    let qkv = &buffers[qkv.0];
    assert_eq!(qkv.width, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, "width of QKV");
    let scratch = Scattered::new(scratch);
    let runs = &runs[..];
    let cache = &*cache;
    // The heads of a block lie next to each other, so a task takes all heads of a run if there are enough runs.
    let heads = if runs.len() >= RUNS_PER_THREAD * pool.threads() { shape.kv_heads } else { 1 };
    let tasks = runs.len() * shape.kv_heads / heads;
    pool.run(tasks, |thread, index| {
        // SAFETY: each thread has a scratch of its own.
        let scratch = unsafe { &mut *scratch.range(thread, 1)[0] };
        for unit in index * heads..(index + 1) * heads {
            let run = runs[unit / shape.kv_heads];
            let table = &step.block_tables[step.spans[run.span].table as usize..];
            let task = Task { forms, shape, run, table, layer, head: unit % shape.kv_heads, cache };
            task.load_queries(qkv.values(), qkv.stride, scratch);
            task.stream(scratch);
            task.finish(target, scratch);
        }
    });
}

impl Task<'_> {
    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    fn rows(&self) -> usize {
        self.run.rows * self.group()
    }

    /// Elements in a group of 32 bits.
    fn pack(&self) -> usize {
        match self.cache.blocks {
            CacheBlocks::F32(_) => 1,
            CacheBlocks::Bf16(_) => 2,
        }
    }

    fn load_queries(&self, qkv: &[f32], stride: usize, scratch: &mut Scratch) {
        let (group, dim) = (self.group(), self.shape.head_dim);
        for row in 0..self.rows() {
            let head = self.head * group + row % group;
            let query = &qkv[(self.run.row + row / group) * stride + head * dim..][..dim];
            let out = &mut scratch.queries[row];
            out[..self.cache.places().dim / self.pack()].fill(0);
            if self.pack() == 1 {
                out.iter_mut().zip(query).for_each(|(out, query)| *out = query.to_bits());
            } else {
                pack_bf16(self.forms.isa, query, out);
            }
        }
    }

    /// Goes over the tiles that any row of the run sees.
    fn stream(&self, scratch: &mut Scratch) {
        scratch.maxima.fill(f32::NEG_INFINITY);
        scratch.totals.fill(0.0);
        let places = self.cache.places();
        let panels = places.dim / LANES;
        scratch.results[..self.rows() * panels].fill([0.0; LANES]);
        let window = self.shape.sliding_window.map_or(usize::MAX, |window| window as usize);
        let first = (self.run.position + 1).saturating_sub(window);
        let end_block = (self.run.position + self.run.rows - 1) / BLOCK_TOKENS + 1;
        let mut block = first / BLOCK_TOKENS;
        while block < end_block {
            // Tiles end at multiples of their size, wherever the first one starts.
            let end = end_block.min((block / TILE_BLOCKS + 1) * TILE_BLOCKS);
            self.prefetch(places, end, end_block);
            self.tile(places, (block, end), window, scratch);
            block = end;
        }
    }

    /// Asks for the blocks of the next tile, or of the next head's first one: blocks lie scattered, so the
    /// processor cannot foresee them.
    fn prefetch(&self, places: Places, block: usize, end_block: usize) {
        let (head, first, end) = if block < end_block {
            (self.head, block, end_block.min(block + TILE_BLOCKS))
        } else if self.head + 1 < self.shape.kv_heads {
            (self.head + 1, 0, end_block.min(TILE_BLOCKS))
        } else {
            return;
        };
        for &block in &self.table[first..end] {
            let start = places.offset(self.layer, block as usize, head);
            let len = 2 * BLOCK_TOKENS * places.dim;
            match &self.cache.blocks {
                CacheBlocks::F32(blocks) => prefetch(&blocks[start..start + len]),
                CacheBlocks::Bf16(blocks) => prefetch(&blocks[start..start + len]),
            }
        }
    }

    fn tile(&self, places: Places, (first, end): (usize, usize), window: usize, scratch: &mut Scratch) {
        let (base, scale) = match &self.cache.blocks {
            CacheBlocks::F32(blocks) => (blocks.as_ptr().cast::<u32>(), 1),
            CacheBlocks::Bf16(blocks) => (blocks.as_ptr().cast::<u32>(), 2),
        };
        let mut keys = [base; TILE_BLOCKS];
        for (index, keys) in keys.iter_mut().enumerate().take(end - first) {
            let start = places.offset(self.layer, self.table[first + index] as usize, self.head);
            // SAFETY: the batch was checked: the block is one of the cache's.
            *keys = unsafe { base.add(start / scale) };
        }
        let keys = &keys[..end - first];
        self.score(places, keys, scratch);
        self.weigh((first, end - first), window, scratch);
        self.add_values(places, keys, scratch);
    }

    /// `scores[row][block] = queries * keys`.
    fn score(&self, places: Places, keys: &[*const u32], scratch: &mut Scratch) {
        let rows = self.rows();
        let mut index = 0;
        while index < keys.len() {
            let panels = panels_of(rows, keys.len() - index);
            let mut b = [keys[index]; TILE_PANELS];
            b[..panels].copy_from_slice(&keys[index..index + panels]);
            let tile = Tile {
                a: scratch.queries.as_ptr().cast(),
                a_stride: HEAD_DIM_MAX,
                rows,
                b: [b; TILE_SEGMENTS],
                segments: 1,
                b_stride: LANES,
                panels,
                groups: places.dim / self.pack(),
                accumulate: false,
                ahead: 0,
            };
            // SAFETY: the queries have `rows` rows, each block `dim` elements for 16 tokens.
            unsafe { (self.forms.cache_tile)(&tile, scratch.sums.0.as_mut_ptr()) };
            for row in 0..rows {
                let sums = &scratch.sums.0[row * panels..][..panels];
                scratch.scores[row][index..index + panels].copy_from_slice(sums);
            }
            index += panels;
        }
    }

    /// Scores to weights, with the running maximum and total of each row.
    fn weigh(&self, (first, blocks): (usize, usize), window: usize, scratch: &mut Scratch) {
        let (group, rows) = (self.group(), self.rows());
        let panels = self.cache.places().dim / LANES;
        for row in 0..rows {
            let position = self.run.position + row / group;
            let start = first * BLOCK_TOKENS;
            // Lanes from `low` to `high` of the tile are seen.
            let low = (position + 1).saturating_sub(window).saturating_sub(start);
            let high = (position + 1 - start.min(position + 1)).min(blocks * BLOCK_TOKENS);
            let scores = &mut scratch.scores[row][..blocks];
            let mut state = [scratch.maxima[row], scratch.totals[row], 1.0];
            weigh(self.forms.isa, scores, (low, high), self.shape.scale, &mut state);
            scratch.maxima[row] = state[0];
            scratch.totals[row] = state[1];
            if state[2] != 1.0 {
                self.rescale(row, panels, state[2], scratch);
            }
            let weights = &mut scratch.weights[row];
            let scores = scratch.scores[row].as_flattened();
            if self.pack() == 1 {
                weights.iter_mut().zip(scores).for_each(|(out, weight)| *out = weight.to_bits());
            } else {
                pack_bf16(self.forms.isa, &scores[..blocks * BLOCK_TOKENS], weights);
            }
        }
    }

    /// Multiplies a row's results by a factor.
    fn rescale(&self, row: usize, panels: usize, factor: f32, scratch: &mut Scratch) {
        let rows = self.rows();
        let mut panel = 0;
        while panel < panels {
            let chunk = panels_of(rows, panels - panel);
            let results = &mut scratch.results[panel * rows + row * chunk..][..chunk];
            lanes::scale(self.forms.isa, results, factor);
            panel += chunk;
        }
    }

    /// `results += weights * values`.
    fn add_values(&self, places: Places, keys: &[*const u32], scratch: &mut Scratch) {
        let (rows, pack, panels) = (self.rows(), self.pack(), places.dim / LANES);
        let mut panel = 0;
        while panel < panels {
            let chunk = panels_of(rows, panels - panel);
            let mut b = [[keys[0]; TILE_PANELS]; TILE_SEGMENTS];
            for (b, &keys) in b.iter_mut().zip(keys) {
                for (index, b) in b.iter_mut().enumerate().take(chunk) {
                    // SAFETY: the values of a block follow its keys, and `chunk` panels of them are left.
                    *b = unsafe { keys.add(BLOCK_TOKENS * places.dim / pack + (panel + index) * LANES) };
                }
            }
            let tile = Tile {
                a: scratch.weights.as_ptr().cast(),
                a_stride: TILE_TOKENS,
                rows,
                b,
                segments: keys.len(),
                b_stride: places.dim,
                panels: chunk,
                groups: BLOCK_TOKENS / pack,
                accumulate: true,
                ahead: 0,
            };
            let results = &mut scratch.results[panel * rows..][..rows * chunk];
            // SAFETY: the weights have `rows` rows, each block 16 values of `dim` elements.
            unsafe { (self.forms.cache_tile)(&tile, results.as_mut_ptr()) };
            panel += chunk;
        }
    }

    fn finish(&self, target: Target, scratch: &mut Scratch) {
        let (group, dim, rows) = (self.group(), self.shape.head_dim, self.rows());
        let panels = self.cache.places().dim / LANES;
        for row in 0..rows {
            self.rescale(row, panels, 1.0 / scratch.totals[row], scratch);
            let head = self.head * group + row % group;
            let first = (self.run.row + row / group) * target.stride + head * dim;
            let mut panel = 0;
            while panel < panels {
                let chunk = panels_of(rows, panels - panel);
                let results = scratch.results[panel * rows + row * chunk..][..chunk].as_flattened();
                let len = results.len().min(dim - panel * LANES);
                // SAFETY: each head of a row belongs to one task.
                unsafe { target.store.put(self.forms.isa, first + panel * LANES, &results[..len]) };
                panel += chunk;
            }
        }
    }
}

/// Asks for memory to be brought into the caches.
fn prefetch<T>(memory: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..size_of_val(memory) / 64 {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch has no effect but on speed; the address is inside of the slice.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(memory.as_ptr().cast::<i8>().add(line * 64)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = memory;
}

/// Panels that a tile of these rows takes at once.
fn panels_of(rows: usize, left: usize) -> usize {
    match left {
        1 => 1,
        2 | 3 => 2,
        _ if rows <= WIDE_TILE_ROWS => 4,
        _ => 2,
    }
}

#[inline(always)]
fn pack_bf16_body(values: &[f32], out: &mut [u32]) {
    let (pairs, _) = values.as_chunks::<2>();
    for (out, pair) in out.iter_mut().zip(pairs) {
        *out = u32::from(lanes::bf16_bits(pair[0])) | u32::from(lanes::bf16_bits(pair[1])) << 16;
    }
}

versions! {
    /// Rounds to bf16, two to a word; an odd last value is left out (heads are even).
    pub fn pack_bf16(values: &[f32], out: &mut [u32]) = pack_bf16_body;
}

#[inline(always)]
fn weigh_body(scores: &mut [[f32; LANES]], (low, high): (usize, usize), scale: f32, state: &mut [f32; 3]) {
    let mut greatest = [f32::NEG_INFINITY; LANES];
    for (index, scores) in scores.iter_mut().enumerate() {
        for lane in 0..LANES {
            let token = index * LANES + lane;
            let score = scores[lane] * scale;
            let score = if (token >= low) & (token < high) { score } else { f32::NEG_INFINITY };
            scores[lane] = score;
            greatest[lane] = if score > greatest[lane] { score } else { greatest[lane] };
        }
    }
    let tile_maximum = lanes::maximum(&greatest);
    let maximum = if tile_maximum > state[0] { tile_maximum } else { state[0] };
    // Nothing seen yet, in no tile: any finite maximum keeps the arithmetic free of infinity minus infinity.
    let shift = if maximum == f32::NEG_INFINITY { 0.0 } else { maximum };
    let factor = lanes::exponential(state[0] - shift);
    let mut totals = [0.0; LANES];
    for scores in scores.iter_mut() {
        for lane in 0..LANES {
            let weight = lanes::exponential(scores[lane] - shift);
            scores[lane] = weight;
            totals[lane] += weight;
        }
    }
    *state = [maximum, state[1] * factor + lanes::sum(totals), factor];
}

versions! {
    /// One row of a tile: scores of lanes `seen.0..seen.1` to weights relative to the running maximum. `state`
    /// is maximum, total, and on return the factor for what was added up before.
    pub fn weigh(
        scores: &mut [[f32; LANES]],
        seen: (usize, usize),
        scale: f32,
        state: &mut [f32; 3],
    ) = weigh_body;
}
