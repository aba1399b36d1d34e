//! Paged causal attention, streamed over fixed tiles of the cache (online softmax: Milakov and Gimelshein 2018;
//! tiling: FlashAttention, Dao et al. 2022).
//!
//! The query heads that share a key-value head, for a few neighbouring rows, are the rows of the tile product;
//! the blocks of the cache already lie as its panels. Tiles start at multiples of `TILE_TOKENS` positions and
//! end with the block that holds the row itself, and rows are grouped inside aligned runs of positions that lie
//! in one block: a row goes through the same operations alone, in a chunk and in any batch. A cache of 8-bit codes is
//! widened tile by tile; its scales are factors on the scores and on the result.

use std::f32::consts::LOG2_E;
use std::ops::Range;

use super::arena::{Arena, Cache, CacheBlocks, Places, RowRun, cut};
use super::forms::Forms;
use super::lanes;
use super::rows::ScatteredRows;
use super::scratch::{AttentionScratch, TILE_BLOCKS, Widened};
use super::tile::{
    GROUPS_AHEAD, Held, LANES, QUERY_TOP, TILE_PANELS, TILE_ROWS, TILE_SEGMENTS, Tile, WIDE_TILE_ROWS,
};
use super::weigh::{Weighing, weigh_bf16, weigh_f32};
use crate::groups::cut_group;
use crate::ops::{AttentionShape, BLOCK_TOKENS, Buffer, KvScales};
use crate::pool::{Pool, Scattered};

/// Runs per thread from which on tasks are whole runs: enough to even out their different lengths.
const RUNS_PER_THREAD: usize = 8;

/// Where results go: an operand, or values that are quantised afterwards.
#[derive(Clone, Copy)]
pub struct AttentionOutput {
    /// The rows.
    pub store: ScatteredRows,
    /// Elements from row to row.
    pub stride: usize,
}

/// One task: the queries of a run, key-value head after key-value head.
struct Task<'a> {
    forms: Forms,
    shape: &'a AttentionShape,
    run: RowRun,
    table: &'a [u32],
    layer: usize,
    cache: &'a Cache,
    places: Places,
    /// Parts into which the query heads of a key-value head are cut so that they fit into a tile, and heads of each. A
    /// part goes through the same operations as a whole group: below, a head is a part of a key-value head's.
    parts: usize,
    group: usize,
    /// Elements in 32 bits of the cache, widened from 8-bit codes if it holds any.
    pack: usize,
    /// What queries and weights are held in.
    left: Held,
    scales: KvScales,
    cap: Option<f32>,
}

/// Which half of a block.
#[derive(Clone, Copy)]
enum Half {
    Keys = 0,
    Values = 1,
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
    (layer, qkv, target): (usize, Buffer, AttentionOutput),
    shape: &AttentionShape,
) {
    let Arena { plan, buffers, cache, step, runs, attention: scratch, .. } = arena;
    let cap = plan.score_cap;
    assert!(shape.heads.is_multiple_of(shape.kv_heads), "query heads are a multiple of key-value heads");
    let (parts, group) = cut_group(shape.heads / shape.kv_heads, TILE_ROWS);
    assert_eq!((shape.kv_heads, shape.head_dim), (cache.plan.kv_heads, cache.plan.head_dim), "cache shape");
    cut(&step.spans, rows_per_run(group), runs);
    let qkv = &buffers[qkv.0];
    assert_eq!(qkv.width, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, "width of QKV");
    let scratch = Scattered::new(scratch);
    let runs = &runs[..];
    let cache = &*cache;
    let places = cache.places();
    let (pack, coded) = (cache.pack, matches!(cache.blocks, CacheBlocks::E4m3(_)));
    let left = forms.cache_left;
    let scales = if coded { shape.kv_scales } else { KvScales::ONE };
    // The heads of a block lie next to each other, so a task takes all heads of a run if there are enough runs.
    let all_heads = shape.kv_heads * parts;
    let heads = if runs.len() >= RUNS_PER_THREAD * pool.threads() { all_heads } else { 1 };
    let tasks = all_heads / heads;
    pool.run(runs.len() * tasks, |thread, index| {
        // SAFETY: each thread has a scratch of its own.
        let scratch = unsafe { &mut *scratch.range(thread, 1)[0] };
        let (run, first_head) = (runs[index / tasks], index % tasks * heads);
        let table = &step.block_tables[step.spans[run.span].table as usize..];
        let task =
            Task { forms, shape, run, table, layer, cache, places, parts, group, pack, left, scales, cap };
        for head in first_head..first_head + heads {
            task.load_queries(head, (qkv.values(), qkv.stride), scratch);
            task.stream(head, scratch);
            task.finish(head, target, scratch);
        }
    });
}

impl Task<'_> {
    fn rows(&self) -> usize {
        self.run.rows * self.group
    }

    fn load_queries(&self, head: usize, (qkv, stride): (&[f32], usize), scratch: &mut AttentionScratch) {
        let dim = self.shape.head_dim;
        for row in 0..self.rows() {
            let first = (self.run.row + row / self.group) * stride;
            let query = &qkv[first + (head * self.group + row % self.group) * dim..][..dim];
            if self.left == Held::F32 {
                let out = &mut scratch.queries.f32[row][..self.places.dim];
                out[..dim].copy_from_slice(query);
                out[dim..].fill(0.0);
                continue;
            }
            let out = &mut scratch.queries.paired[row][..self.places.dim];
            if self.left == Held::F16 {
                let scale = &mut scratch.query_scales[row];
                lanes::to_f16(self.forms.isa, query, QUERY_TOP, &mut out[..dim], scale);
            } else {
                lanes::to_bf16(self.forms.isa, query, &mut out[..dim]);
            }
            out[dim..].fill(0);
        }
    }

    /// Positions that a row sees, its own included.
    fn window(&self) -> usize {
        self.shape.sliding_window.map_or(usize::MAX, |window| window as usize)
    }

    /// Goes over the tiles of a head that any row of the run sees. Tiles end at multiples of their size, wherever
    /// the first one starts.
    fn stream(&self, head: usize, scratch: &mut AttentionScratch) {
        scratch.maxima.fill(f32::NEG_INFINITY);
        scratch.totals.fill([0.0; LANES]);
        let end_block = (self.run.position + self.run.rows - 1) / BLOCK_TOKENS + 1;
        let first_block = (self.run.position + 1).saturating_sub(self.window()) / BLOCK_TOKENS;
        let tile_from = |block: usize| block..end_block.min((block / TILE_BLOCKS + 1) * TILE_BLOCKS);
        let mut block = first_block;
        while block < end_block {
            let blocks = tile_from(block);
            let next = tile_from(if blocks.end < end_block { blocks.end } else { first_block });
            let next_head = head + usize::from(blocks.end == end_block);
            self.ask_for(next_head, &next, Half::Keys);
            let keys = self.operands(head, &blocks, Half::Keys, &mut scratch.widened);
            self.score(&keys[..blocks.len()], scratch);
            self.weigh(&blocks, block == first_block, scratch);
            self.ask_for(next_head, &next, Half::Values);
            let values = self.operands(head, &blocks, Half::Values, &mut scratch.widened);
            self.add_values(&values[..blocks.len()], block == first_block, scratch);
            block = blocks.end;
        }
    }

    /// Where the keys or the values of a tile's blocks start, widened if they have to be. Entries of blocks that a
    /// tile lacks repeat the first.
    fn operands(
        &self,
        head: usize,
        blocks: &Range<usize>,
        half: Half,
        widened: &mut Widened,
    ) -> [*const u32; TILE_BLOCKS] {
        let elements = BLOCK_TOKENS * self.places.dim;
        let mut operands = [std::ptr::null(); TILE_BLOCKS];
        for (index, operand) in operands.iter_mut().enumerate().take(blocks.len()) {
            let block = self.table[blocks.start + index] as usize;
            let start = self.places.offset(self.layer, block, head / self.parts) + half as usize * elements;
            let place = start..start + elements;
            *operand = match &self.cache.blocks {
                CacheBlocks::F32(all) => all[place].as_ptr().cast(),
                CacheBlocks::Bf16(all) | CacheBlocks::F16(all) => all[place].as_ptr().cast(),
                CacheBlocks::E4m3(all) => widened.block(self.forms.isa, index, &all[place]),
            };
        }
        let first = operands[0];
        operands[blocks.len()..].fill(first);
        operands
    }

    /// Asks for the keys or the values of a tile that comes next: blocks lie anywhere, where no processor looks ahead.
    fn ask_for(&self, head: usize, blocks: &Range<usize>, half: Half) {
        if head == self.shape.kv_heads * self.parts {
            return;
        }
        let elements = BLOCK_TOKENS * self.places.dim;
        for &block in &self.table[blocks.clone()] {
            let start =
                self.places.offset(self.layer, block as usize, head / self.parts) + half as usize * elements;
            match &self.cache.blocks {
                CacheBlocks::F32(all) => lanes::prefetch(all[start..].as_ptr().cast(), elements * 4),
                CacheBlocks::Bf16(all) | CacheBlocks::F16(all) => {
                    lanes::prefetch(all[start..].as_ptr().cast(), elements * 2);
                }
                CacheBlocks::E4m3(all) => lanes::prefetch(all[start..].as_ptr(), elements),
            }
        }
    }

    /// `scores[row][block] = queries * keys`.
    fn score(&self, keys: &[*const u32], scratch: &mut AttentionScratch) {
        let rows = self.rows();
        let (a, a_stride) = scratch.queries.operand(self.left.group());
        let mut index = 0;
        while index < keys.len() {
            let panels = panels_of(rows, keys.len() - index);
            let mut b = [keys[index]; TILE_PANELS];
            b[..panels].copy_from_slice(&keys[index..index + panels]);
            let tile = Tile {
                a,
                a_stride,
                rows,
                b: [b; TILE_SEGMENTS],
                segments: 1,
                b_stride: LANES,
                panels,
                groups: self.places.dim / self.pack,
                sums_stride: TILE_BLOCKS,
                accumulate: false,
                later: a,
                next: [b.map(|keys| keys.wrapping_add(GROUPS_AHEAD * LANES)); TILE_SEGMENTS],
            };
            let scores = &mut scratch.scores.as_flattened_mut()[index..];
            // SAFETY: the queries have `rows` rows, each block `dim` elements for 16 tokens.
            unsafe { (self.forms.cache_tile)(&tile, scores.as_mut_ptr()) };
            index += panels;
        }
    }

    /// Scores to weights, with the running maximum and total of each row.
    fn weigh(&self, blocks: &Range<usize>, first: bool, scratch: &mut AttentionScratch) {
        let rows = self.rows();
        let (start, end) = (blocks.start * BLOCK_TOKENS, blocks.end * BLOCK_TOKENS);
        // Lanes of the tile that a row sees, from and up to.
        let mut seen = [(0, 0); TILE_ROWS];
        for (row, seen) in seen.iter_mut().enumerate().take(rows) {
            let position = self.run.position + row / self.group;
            let low = (position + 1).saturating_sub(self.window()).saturating_sub(start);
            *seen = (low as u32, (position + 1).clamp(start, end) as u32 - start as u32);
        }
        let panels = self.places.dim / LANES;
        let tile = Weighing {
            blocks: blocks.len(),
            seen: &seen[..rows],
            scale: self.shape.scale * self.scales.key * LOG2_E,
            cap: self.cap.map(|cap| cap * LOG2_E),
            query_scales: &scratch.query_scales,
            scores: &mut scratch.scores,
            maxima: &mut scratch.maxima,
            totals: &mut scratch.totals,
            results: if first { &mut [] } else { &mut scratch.results[..rows * panels] },
            panels,
        };
        match self.left {
            Held::F32 => weigh_f32(self.forms.isa, tile, &mut scratch.weights.f32),
            Held::F16 => {
                let (weights, seen) = (&mut scratch.weights, 0..blocks.len() * BLOCK_TOKENS);
                weigh_f32(self.forms.isa, tile, &mut weights.f32);
                for (weights, out) in weights.f32.iter().zip(&mut weights.paired).take(rows) {
                    lanes::scale_to_f16(self.forms.isa, &weights[seen.clone()], 1.0, &mut out[seen.clone()]);
                }
            }
            _ => weigh_bf16(self.forms.isa, tile, &mut scratch.weights.paired),
        }
    }

    /// `results += weights * values`; the first tile of a head starts from zero.
    fn add_values(&self, values: &[*const u32], first: bool, scratch: &mut AttentionScratch) {
        let (rows, panels) = (self.rows(), self.places.dim / LANES);
        let (a, a_stride) = scratch.weights.operand(self.left.group());
        let mut panel = 0;
        while panel < panels {
            let chunk = panels_of(rows, panels - panel);
            let panels_from = |groups: usize| {
                let mut panels = [[values[0]; TILE_PANELS]; TILE_SEGMENTS];
                for (panels, values) in panels.iter_mut().zip(values) {
                    for (index, place) in panels.iter_mut().enumerate().take(chunk) {
                        *place = values.wrapping_add(groups * self.places.dim + (panel + index) * LANES);
                    }
                }
                panels
            };
            let tile = Tile {
                a,
                a_stride,
                rows,
                b: panels_from(0),
                segments: values.len(),
                b_stride: self.places.dim,
                panels: chunk,
                groups: BLOCK_TOKENS / self.pack,
                sums_stride: panels,
                accumulate: !first,
                later: a,
                next: panels_from(GROUPS_AHEAD),
            };
            let results = &mut scratch.results[panel..rows * panels];
            // SAFETY: the weights have `rows` rows, each block 16 values of `dim` elements.
            unsafe { (self.forms.cache_tile)(&tile, results.as_mut_ptr()) };
            panel += chunk;
        }
    }

    fn finish(&self, head: usize, target: AttentionOutput, scratch: &mut AttentionScratch) {
        let (group, dim, rows) = (self.group, self.shape.head_dim, self.rows());
        let panels = self.places.dim / LANES;
        for row in 0..rows {
            let results = &mut scratch.results[row * panels..][..panels];
            lanes::scale(self.forms.isa, results, self.scales.value / lanes::sum(scratch.totals[row]));
            let head = head * group + row % group;
            let first = (self.run.row + row / group) * target.stride + head * dim;
            // SAFETY: each head of a row belongs to one task.
            unsafe { target.store.put(self.forms.isa, first, &results.as_flattened()[..dim]) };
        }
    }
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
