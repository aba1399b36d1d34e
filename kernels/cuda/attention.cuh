//! Paged attention: the interface between these kernels and whoever launches them.
//!
//! Two kinds of kernel share one arithmetic, so that a row gives the same bytes in either: `attention_decode_*`
//! takes spans of one row, `attention_prefill_*` spans of any number of rows. Every kernel cuts a row's context
//! at multiples of `SPLIT_KEYS` (absolute positions), walks a split in tiles of `tile_keys(head_dim)` keys with
//! an online softmax, and merges the splits in ascending order. Nothing in that depends on the batch.
//!
//! The same numbers in the cache give the same bytes, whatever type it has.
//!
//! The kernels check no bounds: whoever writes the plan has checked the batch (`Batch::check`).

#pragma once

#include <cstdint>
#include <cuda_bf16.h>

namespace millrace {

/// Tokens of one KV block, as `BLOCK_TOKENS` in Rust.
constexpr uint32_t PAGE_TOKENS = 16;

/// A context is cut at multiples of this many positions; partial results are merged in ascending order.
constexpr uint32_t SPLIT_KEYS = 512;

/// Query heads that a unit of decode takes at most: a greater group is cut into parts.
constexpr uint32_t GROUP_MAX = 8;

/// Keys of one step of the online softmax.
__host__ __device__ constexpr uint32_t tile_keys(uint32_t head_dim) { return head_dim > 128 ? 64 : 128; }

/// Query rows times heads of the group that one CTA of a prefill kernel computes.
__host__ __device__ constexpr uint32_t prefill_tile_rows(uint32_t head_dim) { return head_dim > 128 ? 64 : 128; }

/// The same of the kernels `attention_prefill_small_*`.
__host__ __device__ constexpr uint32_t prefill_small_tile_rows(uint32_t head_dim) {
    return head_dim > 128 ? 32 : head_dim > 96 ? 64 : 128;
}

// ---- The cache --------------------------------------------------------------------------------------------
//
// One layer's cache is `[block][0 key, 1 value][kv_head]` pages. A page holds 16 tokens of one head, contiguous
// (16 * head_dim elements), in the swizzle that the tensor cores read without bank conflicts: columns of 64
// elements (128 bytes; 32 elements where 64 does not divide the head), `[head_dim / width][16 tokens][width]`,
// and within a token's 128 (64) bytes the 16-byte chunks permuted by the token. So a page is copied as it is,
// by the bulk copy engine, and both wgmma (128-byte and 64-byte swizzle) and ldmatrix read it in place.

/// Elements of a token that lie side by side.
__host__ __device__ constexpr uint32_t page_columns(uint32_t head_dim) { return head_dim % 64 == 0 ? 64 : 32; }

/// Where in its page the element `d` of `token` (0 to 15) lies, in elements. Eight elements from a `d` that is a
/// multiple of 8 lie side by side, 16-byte aligned.
__host__ __device__ constexpr uint32_t page_offset(uint32_t head_dim, uint32_t token, uint32_t d) {
    const uint32_t width = page_columns(head_dim);
    const uint32_t chunk = d % width / 8;
    const uint32_t turned = width == 64 ? chunk ^ (token & 7) : chunk ^ ((token >> 1) & 3);
    return d / width * (PAGE_TOKENS * width) + token * width + turned * 8 + d % 8;
}

/// Where a page of a layer's cache starts, in elements. `value` is 0 for keys, 1 for values.
__host__ __device__ constexpr uint64_t page_start(uint32_t block, uint32_t value, uint32_t kv_heads,
                                                  uint32_t kv_head, uint32_t head_dim) {
    return ((uint64_t(block) * 2 + value) * kv_heads + kv_head) * (PAGE_TOKENS * head_dim);
}

// A cache of 8-bit floats (e4m3.cuh) has the same pages, one byte an element, in groups of 16 elements of the head:
// `[head_dim / 16][16][16]`. A group of keys has a row per token, a group of values a row per element, so that either
// is read as rows of the dot product by ldmatrix, without transposing bytes and without bank conflicts. In a row,
// columns 2t, 2t + 1, 2t + 8 and 2t + 9 lie side by side: they are what one thread holds of an operand.

/// Where in its row of 16 the column `c` lies. Columns `c` and `c + 1` are neighbours where `c` is even.
__host__ __device__ constexpr uint32_t fp8_place(uint32_t c) { return c % 8 / 2 * 4 + c / 8 * 2 + c % 2; }

/// Where in its page the element `d` of the key of `token` (0 to 15) lies, in bytes.
__host__ __device__ constexpr uint32_t fp8_key_offset(uint32_t token, uint32_t d) {
    return d / 16 * 256 + token * 16 + fp8_place(d % 16);
}

/// The same of a value.
__host__ __device__ constexpr uint32_t fp8_value_offset(uint32_t token, uint32_t d) {
    return d * 16 + fp8_place(token);
}

// ---- The plan of a step -----------------------------------------------------------------------------------
//
// Written once per step, read by every layer. Counts live in device memory, so that a captured graph replays
// with new contents.

/// The rows of one sequence in a step (`Span` in Rust).
struct AttentionSpan {
    uint32_t first_row;
    uint32_t rows;
    uint32_t context;
    uint32_t table;
};

/// One split of a span of one row. The items of a span stand in a row, in ascending order of splits, for all
/// splits from 0 to `(context - 1) / SPLIT_KEYS`; the item's own index addresses its partial result.
struct DecodeItem {
    uint32_t span;
    uint32_t split;
};

// `decode_runs` are the indices of the items at which runs begin: of every span of one row, its split 0, which stands
// for splits 0 to `AttentionCounts::run_splits - 1` (as many as there are), and each split after them. List the longest
// first: the warps deal them out in order.

/// One tile of a span: packed rows `[tile, tile + 1)` times the kernel's `prefill_tile_rows(head_dim)` (or
/// `prefill_small_tile_rows`) of the `rows * group` ones, where
/// packed row `i` is row `i / group`, query head `kv_head * group + i % group`. List the tiles with the longest
/// contexts first: the kernels deal them out in order.
struct PrefillTile {
    uint32_t span;
    uint32_t tile;
};

/// Live entries of the plan's lists.
struct AttentionCounts {
    uint32_t decode_items;
    uint32_t prefill_tiles;
    uint32_t decode_runs;
    /// Splits at the head of a span that make one run, 1 or more.
    uint32_t run_splits;
};

/// The argument of every attention kernel, by value. Pointers are device pointers, 16-byte aligned.
struct AttentionArguments {
    /// Row `r`, head `h` at `queries + r * query_stride + h * head_dim`; the stride in elements, a multiple of 8.
    const __nv_bfloat16* queries;
    /// Row `r`, head `h` at `out + r * out_stride + h * head_dim`; the stride in elements, a multiple of 8.
    __nv_bfloat16* out;
    /// This layer's pages, of what the kernel is made for.
    const void* cache;
    const AttentionSpan* spans;
    const uint32_t* tables;
    const DecodeItem* decode_items;
    const uint32_t* decode_runs;
    const PrefillTile* prefill_tiles;
    const AttentionCounts* counts;
    /// `partial_floats(items, heads, head_dim)` floats for the splits' results of decodes.
    float* partials;
    /// `counter_words(spans, kv_heads)` words, zeroed once before the first launch; every launch leaves them zero.
    uint32_t* counters;
    uint32_t query_stride;
    uint32_t out_stride;
    /// Key-value heads, each with a group of query heads. For decodes a head of the cache may stand for several: each
    /// then has an equal part of its group.
    uint32_t kv_heads;
    /// Query heads of each of these; for decodes 1 to GROUP_MAX.
    uint32_t group;
    /// Key-value heads of the cache, and how many of `kv_heads` each stands for. Prefills take whole groups.
    uint32_t cache_heads;
    uint32_t parts;
    /// Positions that a row sees up to and with its own; 0 is unlimited.
    uint32_t window;
    /// Decode items for which `partials` has room.
    uint32_t items_max;
    /// Factor on the scores times log2(e); that of the keys' codes, if any, is in it. Of capped scores log2(e) alone.
    float scale_log2;
    /// Factor on the values' codes, if they are any.
    float value_scale;
    /// Cap of the scores, and twice log2(e) times their factor over it. Read by the kernels with `capped` in their names.
    float cap;
    float cap_rate;
};

/// Floats of `AttentionArguments::partials`.
__host__ __device__ constexpr uint64_t partial_floats(uint64_t items_max, uint64_t heads, uint64_t head_dim) {
    return items_max * heads * (head_dim + 2);
}

/// Words of `AttentionArguments::counters`: one per span and key-value head, and a ticket.
__host__ __device__ constexpr uint64_t counter_words(uint64_t spans_max, uint64_t kv_heads) {
    return spans_max * kv_heads + 1;
}

// ---- Launching --------------------------------------------------------------------------------------------
//
// The names, `{h}` the head size:
//   attention_decode_h{64,96,128,256}       sm_80 and up; spans of one row
//   attention_decode_runs_h{64,96,128}      sm_90 and up (elsewhere an empty kernel); the same, faster for many spans
//   attention_prefill_h{64,96,128,256}      sm_80 and up; spans of any number of rows
//   attention_prefill_wgmma_h{64,128}       sm_90a alone (elsewhere an empty kernel); as the one before, faster
//   attention_decode_fp8_h{64,96,128,256}   as attention_decode, over a cache of 8-bit floats
//   attention_decode_runs_fp8_h{64,96,128}  as attention_decode_runs, over such a cache
//   attention_prefill_fp8_h{64,96,128,256}  as attention_prefill, over such a cache
//   attention_decode_small_h*, attention_decode_small_fp8_h*, attention_prefill_small_h{96,128,256} and
//   attention_prefill_small_fp8_h{96,128,256}: the same for chips whose blocks have 99 KiB of shared memory
//   attention_decode_capped_h*, attention_decode_capped_fp8_h*, attention_prefill_capped_h* and
//   attention_prefill_capped_fp8_h*, all of {64,96,128,256}: the same for every chip, with capped scores
// All take one AttentionArguments. Raise the limit of dynamic shared memory to the bytes below, once per kernel.
// Grids need not follow the batch: what finds no work leaves. Launches that share `partials` and `counters` must
// be ordered (one stream). Every kernel may be launched as a programmatic dependent: before it waits for its predecessor
// it reads the plan (spans, tables, items, runs, tiles, counts) and, in the runs of decodes, the pages before that of the
// row's own position, and nothing else. So both must have been written before the step's first kernel began.

/// Decode: grid: multiprocessors, one CTA each (a smaller grid works too). `limit` is the device's shared memory
/// per block with opt-in: 227 KiB on sm_90, 163 KiB on sm_80, and 99 KiB on sm_86, sm_89 and sm_120, which takes the small
/// kernels.
constexpr uint32_t DECODE_THREADS = 224;
__host__ __device__ constexpr uint32_t decode_shared_bytes(uint32_t limit) {
    return limit >= 224 * 1024 ? 224 * 1024 : limit >= 160 * 1024 ? 160 * 1024 : 96 * 1024;
}

/// `attention_decode_runs_*`: grid as decode; threads and shared memory:
constexpr uint32_t RUN_WARPS = 8;
constexpr uint32_t RUN_THREADS = 32 * RUN_WARPS;
/// Of a warp: the ring of pages, and a tile's scores.
constexpr uint32_t RUN_RING_BYTES = 24 * 1024;
constexpr uint32_t RUN_SCORE_BYTES = 4 * 1024;
constexpr uint32_t RUN_BARRIER_BYTES = 1024;
constexpr uint32_t RUN_SHARED_BYTES = RUN_BARRIER_BYTES + RUN_WARPS * (RUN_RING_BYTES + RUN_SCORE_BYTES);

/// `attention_prefill_h*`: grid (kv_heads, tiles or more), threads and shared memory:
__host__ __device__ constexpr uint32_t prefill_threads(uint32_t head_dim) { return prefill_tile_rows(head_dim) * 2; }
__host__ __device__ constexpr uint32_t prefill_shared_bytes(uint32_t head_dim) {
    // Queries, one tile of keys, one of values, and the merged result in f32.
    return prefill_tile_rows(head_dim) * head_dim * (2 + 4) + tile_keys(head_dim) * head_dim * 2 * 2;
}

/// `attention_prefill_small_*`: grid as before; threads and shared memory, in which keys and values take turns:
__host__ __device__ constexpr uint32_t prefill_small_threads(uint32_t head_dim) {
    return prefill_small_tile_rows(head_dim) * 2;
}
__host__ __device__ constexpr uint32_t prefill_small_shared_bytes(uint32_t head_dim) {
    return prefill_small_tile_rows(head_dim) * head_dim * (2 + 4) + tile_keys(head_dim) * head_dim * 2;
}

/// `attention_prefill_wgmma_h*`: grid: multiprocessors; threads and shared memory:
constexpr uint32_t PREFILL_WGMMA_THREADS = 384;
__host__ __device__ constexpr uint32_t prefill_wgmma_shared_bytes(uint32_t head_dim) {
    // Alignment and barriers; three stages of keys and two of values; the merged result in f32.
    return 1024 + 1024 + 5 * 128 * head_dim * 2 + 128 * head_dim * 4;
}

}  // namespace millrace
