//! Paged attention for spans of one row (decode).
//!
//! A warp takes one split (`SPLIT_KEYS` positions) of one span and one key-value head at a time and walks it
//! alone: the group's query heads are the columns of m16n8k16, pages stream through the warp's own ring in shared
//! memory, and no two warps wait for each other. Whoever finishes a span's last split merges all of them, in
//! ascending order. Units are dealt out by a ticket, which decides who computes, never what.
//!
//! Refuses nothing: groups above `GROUP_MAX` are a bug of the caller.
//! Invariant: `counters` are zero before and after every launch.

#include "attention_tile.cuh"

namespace millrace {
namespace {

template <int HEAD>
struct Ring {
    static constexpr uint32_t PAGE_BYTES = HEAD * 32;
    /// Pages that are loaded, awaited and given back together.
    static constexpr uint32_t STEP = HEAD > 128 ? 1 : 2;
    static constexpr uint32_t STAGE_BYTES = STEP * PAGE_BYTES;
    static constexpr uint32_t STAGES = HEAD == 64 ? 8 : 4;
    static_assert(STAGES * STAGE_BYTES <= DECODE_RING_BYTES);

    uint32_t pages;
    uint32_t barriers;
    /// Stages asked for and stages given back since the kernel began, and asked for since the unit began.
    uint32_t asked;
    uint32_t used;
    uint32_t index;
};

/// The pages of one unit: this lane's entry of the block table, and where the head's pages lie.
struct Pages {
    const bf16* cache;
    uint32_t block;
    uint32_t first;
    uint32_t end;
    uint32_t kv_heads;
    uint32_t kv_head;
};

template <int HEAD>
struct Tile {
    static constexpr uint32_t PAGES = tile_keys(HEAD) / PAGE_TOKENS;
    static constexpr uint32_t STEPS = PAGES / Ring<HEAD>::STEP;
    static constexpr uint32_t STAGES_PER_TILE = 2 * STEPS;
};

/// Asks for the unit's next stage: tile by tile, `STEPS` stages of keys and then as many of values. A stage
/// beyond the unit's pages is asked for without bytes, so that both sides count alike.
template <int HEAD>
__device__ __forceinline__ void ask(Ring<HEAD>& ring, const Pages& pages, uint32_t lane) {
    using R = Ring<HEAD>;
    const uint32_t tile = ring.index / Tile<HEAD>::STAGES_PER_TILE;
    const uint32_t place = ring.index % Tile<HEAD>::STAGES_PER_TILE;
    const uint32_t value = place / Tile<HEAD>::STEPS;
    const uint32_t page = pages.first + tile * Tile<HEAD>::PAGES + place % Tile<HEAD>::STEPS * R::STEP;
    const uint32_t stage = ring.asked % R::STAGES;
    const uint32_t to = ring.pages + stage * R::STAGE_BYTES;
    const uint32_t live = page >= pages.end ? 0 : min(R::STEP, pages.end - page);
#ifdef MILLRACE_BULK_COPY
    const uint32_t barrier = ring.barriers + stage * 8;
    if (lane == 0) barrier_expect(barrier, live * R::PAGE_BYTES);
#endif
#pragma unroll
    for (uint32_t i = 0; i < R::STEP; ++i) {
        const uint32_t block = __shfl_sync(0xffffffffu, pages.block, (page + i) % 32);
        if (i >= live) continue;
        const bf16* from = pages.cache + page_start(block, value, pages.kv_heads, pages.kv_head, HEAD);
#ifdef MILLRACE_BULK_COPY
        if (lane == 0) copy_bulk(to + i * R::PAGE_BYTES, from, R::PAGE_BYTES, barrier);
#else
        for (uint32_t at = lane * 16; at < R::PAGE_BYTES; at += 512)
            copy16_async(to + i * R::PAGE_BYTES + at, reinterpret_cast<const char*>(from) + at);
#endif
    }
#ifndef MILLRACE_BULK_COPY
    commit_copies();
#endif
    ++ring.asked;
    ++ring.index;
}

/// Waits for the oldest stage and returns where its pages lie.
template <int HEAD>
__device__ __forceinline__ uint32_t await_stage(const Ring<HEAD>& ring) {
    using R = Ring<HEAD>;
    const uint32_t stage = ring.used % R::STAGES;
#ifdef MILLRACE_BULK_COPY
    barrier_wait(ring.barriers + stage * 8, ring.used / R::STAGES % 2);
#else
    await_copies<R::STAGES - 1>();
    __syncwarp();
#endif
    return ring.pages + stage * R::STAGE_BYTES;
}

/// Gives the oldest stage back and asks for the next in its place.
template <int HEAD>
__device__ __forceinline__ void give_back(Ring<HEAD>& ring, const Pages& pages, uint32_t lane) {
    __syncwarp();
    ++ring.used;
    ask<HEAD>(ring, pages, lane);
}

/// The state of a warp's unit: up to 8 query rows (the group), of which a thread holds `2 * (lane % 4)` and the one
/// after; queries as the B operand, accumulators transposed.
template <int HEAD>
struct Unit {
    uint32_t query[HEAD / 16][2];
    float out[HEAD / 16][4];
    RowSum rows[2];
};

/// Loads the group's queries; rows beyond the group are zero.
template <int HEAD>
__device__ __forceinline__ void begin_unit(Unit<HEAD>& unit, const AttentionArguments& arguments, uint32_t row,
                                           uint32_t kv_head, uint32_t lane) {
    const uint32_t head = lane / 4;
    const bool live = head < arguments.group;
    const bf16* from = arguments.queries + uint64_t(row) * arguments.query_stride +
                       (kv_head * arguments.group + head) * HEAD + lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < HEAD / 16; ++step) {
        unit.query[step][0] = live ? *reinterpret_cast<const uint32_t*>(from + step * 16) : 0;
        unit.query[step][1] = live ? *reinterpret_cast<const uint32_t*>(from + step * 16 + 8) : 0;
    }
    unit.rows[0] = unit.rows[1] = empty_row();
#pragma unroll
    for (int i = 0; i < HEAD / 16; ++i) unit.out[i][0] = unit.out[i][1] = unit.out[i][2] = unit.out[i][3] = 0.f;
}

/// Clears the values of a page from token `first` on: unwritten memory may hold what is no number, and 0 times
/// that is no number either.
template <int HEAD>
__device__ __forceinline__ void clear_tokens(uint32_t page, uint32_t first, uint32_t lane) {
    const uint32_t chunks = HEAD / 8;
    for (uint32_t at = lane; at < (PAGE_TOKENS - first) * chunks; at += 32)
        store16_shared(page + page_offset(HEAD, first + at / chunks, at % chunks * 8) * 2, make_uint4(0, 0, 0, 0));
#ifdef MILLRACE_BULK_COPY
    fence_async_proxy();
#endif
    __syncwarp();
}

/// Scores of one tile: waits for its keys page by page and asks for what comes `STAGES` later.
template <int HEAD>
__device__ __forceinline__ void score_tile(float (&s)[Tile<HEAD>::PAGES][4], const Unit<HEAD>& unit, Ring<HEAD>& ring,
                                           const Pages& pages, uint32_t tile, uint32_t lane) {
    using R = Ring<HEAD>;
    const uint32_t page_first = pages.first + tile * Tile<HEAD>::PAGES;
#pragma unroll
    for (uint32_t i = 0; i < Tile<HEAD>::PAGES; ++i) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.f;
#pragma unroll
    for (uint32_t step = 0; step < Tile<HEAD>::STEPS; ++step) {
        const uint32_t stage = await_stage<HEAD>(ring);
        if (page_first + step * R::STEP < pages.end) {
#pragma unroll
            for (int at = 0; at < HEAD / 16; ++at) {
#pragma unroll
                for (uint32_t i = 0; i < R::STEP; ++i) {
                    uint32_t keys[4];
                    load_matrices(keys, stage + i * R::PAGE_BYTES + key_rows<HEAD>(lane, at));
                    multiply(s[step * R::STEP + i], keys, unit.query[at][0], unit.query[at][1]);
                }
            }
        }
        give_back<HEAD>(ring, pages, lane);
    }
}

/// Adds a tile's weighted values. `end` is where the row's keys end.
template <int HEAD>
__device__ __forceinline__ void accumulate_tile(const float (&s)[Tile<HEAD>::PAGES][4], Unit<HEAD>& unit,
                                                Ring<HEAD>& ring, const Pages& pages, uint32_t tile, uint32_t end,
                                                uint32_t lane) {
    using R = Ring<HEAD>;
    const uint32_t page_first = pages.first + tile * Tile<HEAD>::PAGES;
#pragma unroll
    for (uint32_t step = 0; step < Tile<HEAD>::STEPS; ++step) {
        const uint32_t stage = await_stage<HEAD>(ring);
#pragma unroll
        for (uint32_t i = 0; i < R::STEP; ++i) {
            const uint32_t at = step * R::STEP + i;
            if (page_first + at >= pages.end) continue;
            const uint32_t page = stage + i * R::PAGE_BYTES;
            if ((page_first + at + 1) * PAGE_TOKENS > end) clear_tokens<HEAD>(page, end % PAGE_TOKENS, lane);
            const uint32_t low = transposed(pack_bf16(s[at][0], s[at][1]));
            const uint32_t high = transposed(pack_bf16(s[at][2], s[at][3]));
#pragma unroll
            for (int part = 0; part < HEAD / 16; ++part) {
                uint32_t values[4];
                load_matrices_transposed(values, page + value_rows<HEAD>(lane, part));
                multiply(unit.out[part], values, low, high);
            }
        }
        give_back<HEAD>(ring, pages, lane);
    }
}

/// One tile of a unit, of which the row sees the keys in `[first, end)`.
template <int HEAD>
__device__ __forceinline__ void walk_tile(Unit<HEAD>& unit, Ring<HEAD>& ring, const Pages& pages, uint32_t tile,
                                          uint32_t first, uint32_t end, float scale_log2, uint32_t lane) {
    constexpr uint32_t PAGES = Tile<HEAD>::PAGES;
    float s[PAGES][4];
    score_tile<HEAD>(s, unit, ring, pages, tile, lane);
    const uint32_t key = (pages.first + tile * PAGES) * PAGE_TOKENS;
    if (key < first || key + tile_keys(HEAD) > end) {
#pragma unroll
        for (uint32_t i = 0; i < PAGES; ++i) {
            const uint32_t low = key + i * PAGE_TOKENS + lane / 4, high = low + 8;
            if (low < first || low >= end) s[i][0] = s[i][1] = minus_infinity();
            if (high < first || high >= end) s[i][2] = s[i][3] = minus_infinity();
        }
    }
    const float factors[2] = {soften_transposed<PAGES, 0>(s, unit.rows[0], scale_log2),
                              soften_transposed<PAGES, 1>(s, unit.rows[1], scale_log2)};
#pragma unroll
    for (int i = 0; i < HEAD / 16; ++i) {
        unit.out[i][0] = __fmul_rn(unit.out[i][0], factors[0]);
        unit.out[i][1] = __fmul_rn(unit.out[i][1], factors[1]);
        unit.out[i][2] = __fmul_rn(unit.out[i][2], factors[0]);
        unit.out[i][3] = __fmul_rn(unit.out[i][3], factors[1]);
    }
    accumulate_tile<HEAD>(s, unit, ring, pages, tile, end, lane);
}

/// Merges a span's splits, for one key-value head, from `first_item` on, and writes the output.
template <int HEAD>
__device__ void merge_splits(const AttentionArguments& arguments, uint32_t first_item, uint32_t splits, uint32_t row,
                             uint32_t kv_head, uint32_t lane) {
    constexpr uint32_t AHEAD = 8;
    const uint32_t heads = arguments.kv_heads * arguments.group;
    const float* stats = arguments.partials + uint64_t(arguments.items_max) * heads * HEAD;
    for (uint32_t at = lane * 4; at < arguments.group * HEAD; at += 128) {
        const uint32_t head = kv_head * arguments.group + at / HEAD;
        RowSum total = empty_row();
        float sum[4] = {};
        for (uint32_t base = 0; base < splits; base += AHEAD) {
            float4 part[AHEAD];
            float2 stat[AHEAD];
#pragma unroll
            for (uint32_t i = 0; i < AHEAD; ++i) {
                const uint64_t place = uint64_t(first_item + min(base + i, splits - 1)) * heads + head;
                part[i] = __ldcg(reinterpret_cast<const float4*>(arguments.partials + place * HEAD + at % HEAD));
                stat[i] = __ldcg(reinterpret_cast<const float2*>(stats + place * 2));
            }
#pragma unroll
            for (uint32_t i = 0; i < AHEAD; ++i) {
                if (base + i >= splits) break;
                const MergeFactors factors = merge_rows(total, {stat[i].x, stat[i].y});
                sum[0] = merged(sum[0], part[i].x, factors);
                sum[1] = merged(sum[1], part[i].y, factors);
                sum[2] = merged(sum[2], part[i].z, factors);
                sum[3] = merged(sum[3], part[i].w, factors);
            }
        }
        const float inverse = __frcp_rn(total.sum);
        const uint2 packed = {pack_bf16(finished(sum[0], inverse), finished(sum[1], inverse)),
                              pack_bf16(finished(sum[2], inverse), finished(sum[3], inverse))};
        *reinterpret_cast<uint2*>(arguments.out + uint64_t(row) * arguments.out_stride + head * HEAD + at % HEAD) =
            packed;
    }
}

/// Stores a unit's unfinished result under its item.
template <int HEAD>
__device__ __forceinline__ void store_partial(const Unit<HEAD>& unit, const AttentionArguments& arguments,
                                              uint32_t item, uint32_t kv_head, uint32_t lane) {
    const uint32_t heads = arguments.kv_heads * arguments.group;
    float* stats = arguments.partials + uint64_t(arguments.items_max) * heads * HEAD;
#pragma unroll
    for (uint32_t row = 0; row < 2; ++row) {
        const uint32_t head = lane % 4 * 2 + row;
        if (head >= arguments.group) continue;
        const uint64_t place = uint64_t(item) * heads + kv_head * arguments.group + head;
        float* to = arguments.partials + place * HEAD + lane / 4;
#pragma unroll
        for (int i = 0; i < HEAD / 16; ++i) {
            to[i * 16] = unit.out[i][row];
            to[i * 16 + 8] = unit.out[i][2 + row];
        }
        if (lane < 4) {
            const float2 stat = {unit.rows[row].top, unit.rows[row].sum};
            *reinterpret_cast<float2*>(stats + place * 2) = stat;
        }
    }
}

/// Writes the output of a unit that is its span's only split.
template <int HEAD>
__device__ __forceinline__ void store_output(const Unit<HEAD>& unit, const AttentionArguments& arguments,
                                             uint32_t row, uint32_t kv_head, uint32_t lane) {
    const float inverse[2] = {__frcp_rn(unit.rows[0].sum), __frcp_rn(unit.rows[1].sum)};
    bf16* to = arguments.out + uint64_t(row) * arguments.out_stride +
               (kv_head * arguments.group + lane / 4) * HEAD + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < HEAD / 16; ++i) {
        const float(&out)[4] = unit.out[i];
        const uint32_t low = pack_bf16(finished(out[0], inverse[0]), finished(out[1], inverse[1]));
        const uint32_t high = pack_bf16(finished(out[2], inverse[0]), finished(out[3], inverse[1]));
        const uint32_t low_row = transposed(low), high_row = transposed(high);
        if (lane / 4 >= arguments.group) continue;
        *reinterpret_cast<uint32_t*>(to + i * 16) = low_row;
        *reinterpret_cast<uint32_t*>(to + i * 16 + 8) = high_row;
    }
}

/// One split of one span for one key-value head.
template <int HEAD>
__device__ __forceinline__ void walk_unit(const AttentionArguments& arguments, Ring<HEAD>& ring, uint32_t item,
                                          uint32_t kv_head, uint32_t lane) {
    constexpr uint32_t SPLIT_PAGES = SPLIT_KEYS / PAGE_TOKENS;
    constexpr uint32_t TILE_KEYS = tile_keys(HEAD);
    static_assert(SPLIT_PAGES <= 32, "a lane holds one entry of the block table");
    const DecodeItem work = arguments.decode_items[item];
    const AttentionSpan span = arguments.spans[work.span];
    const uint32_t visible = window_first(span.context - 1, arguments.window);
    const uint32_t split_first = visible / SPLIT_KEYS;
    if (work.split < split_first) return;
    const uint32_t splits = (span.context - 1) / SPLIT_KEYS + 1 - split_first;
    const uint32_t from = max(work.split * SPLIT_KEYS, visible / TILE_KEYS * TILE_KEYS);
    const uint32_t end = min(span.context, (work.split + 1) * SPLIT_KEYS);
    Pages pages = {arguments.cache,    0,       from / PAGE_TOKENS, (end + PAGE_TOKENS - 1) / PAGE_TOKENS,
                   arguments.kv_heads, kv_head};
    // Lane i holds the block of the page whose number is i modulo 32; a split has at most 32 pages.
    const uint32_t mine = work.split * SPLIT_PAGES + (lane + 32 - work.split * SPLIT_PAGES % 32) % 32;
    if (mine >= pages.first && mine < pages.end) pages.block = arguments.tables[span.table + mine];
    await_predecessor();
    ring.index = 0;
    while (ring.index < Ring<HEAD>::STAGES) ask<HEAD>(ring, pages, lane);
    Unit<HEAD> unit;
    begin_unit<HEAD>(unit, arguments, span.first_row, kv_head, lane);
    const uint32_t tiles = (end - from + TILE_KEYS - 1) / TILE_KEYS;
    for (uint32_t tile = 0; tile < tiles; ++tile)
        walk_tile<HEAD>(unit, ring, pages, tile, visible, end, arguments.scale_log2, lane);
    // What was asked for beyond the last tile has no bytes: count it off.
    while (ring.used != ring.asked) {
        await_stage<HEAD>(ring);
        ++ring.used;
    }
    for (RowSum& row : unit.rows) row.sum = row_sum_transposed(row.sum);
    if (splits == 1) return store_output<HEAD>(unit, arguments, span.first_row, kv_head, lane);
    store_partial<HEAD>(unit, arguments, item, kv_head, lane);
    __threadfence();
    __syncwarp();
    uint32_t* counter = arguments.counters + 1 + work.span * arguments.kv_heads + kv_head;
    uint32_t arrived = 0;
    if (lane == 0) arrived = atomicAdd(counter, 1);
    if (__shfl_sync(0xffffffffu, arrived, 0) + 1 != splits) return;
    __threadfence();
    if (lane == 0) *counter = 0;
    const uint32_t first_item = item - (work.split - split_first);
    merge_splits<HEAD>(arguments, first_item, splits, span.first_row, kv_head, lane);
}

/// All units of the step, dealt out to warps: the first by place, the rest by ticket.
template <int HEAD>
__device__ __forceinline__ void decode(const AttentionArguments& arguments) {
    extern __shared__ __align__(1024) unsigned char shared[];
    using R = Ring<HEAD>;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    R ring = {shared_address(shared) + DECODE_HEAD_BYTES + warp * DECODE_RING_BYTES,
              shared_address(shared) + warp * 64, 0, 0, 0};
#ifdef MILLRACE_BULK_COPY
    if (lane < R::STAGES) barrier_init(ring.barriers + lane * 8, 1);
    fence_async_proxy();
    __syncwarp();
#endif
    const uint32_t units = arguments.counts->decode_items * arguments.kv_heads;
    uint32_t unit = warp * gridDim.x + blockIdx.x;
    const uint32_t dealt = min(units, gridDim.x * warps);
    release_successor();
    while (unit < units) {
        walk_unit<HEAD>(arguments, ring, unit / arguments.kv_heads, unit % arguments.kv_heads, lane);
        uint32_t ticket = 0;
        if (lane == 0) {
            ticket = atomicAdd(arguments.counters, 1);
            // As many tickets are drawn as there are units: one for each unit not dealt, one in vain per warp.
            if (ticket + 1 == units) arguments.counters[0] = 0;
        }
        unit = dealt + __shfl_sync(0xffffffffu, ticket, 0);
    }
    await_predecessor();
}

}  // namespace
}  // namespace millrace

#define MILLRACE_DECODE(HEAD)                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * millrace::DECODE_WARPS_MAX, 1)                \
        attention_decode_h##HEAD(const __grid_constant__ millrace::AttentionArguments arguments) { \
        millrace::decode<HEAD>(arguments);                                                         \
    }

MILLRACE_DECODE(64)
MILLRACE_DECODE(96)
MILLRACE_DECODE(128)
MILLRACE_DECODE(256)
