//! The runs of decode attention and their way to a warp: the look-up of a run, and the ring of its own that a warp fills
//! with a run's pages, tile by tile, first keys and then values.
//!
//! A run is a row of splits of one span, for one key-value head. Once all of it has been asked for, the next run is drawn
//! and asked for behind it.
//! Invariant: a stage is asked for anew only after all lanes have read it; a warp waits for its own copies alone, so no
//! two warps can wait for each other.
#pragma once

#include "attention_splits.cuh"

#ifdef MILLRACE_BULK_COPY

namespace millrace {
namespace {

template <int HEAD, Kv KV>
struct RunShape {
    static constexpr uint32_t PAGE_BYTES = HEAD * PAGE_TOKENS * element_bytes(KV);
    static constexpr uint32_t PAGES = tile_keys(HEAD) / PAGE_TOKENS;
    static constexpr uint32_t PARTS = HEAD / 16;
    /// A stage of the ring: as many pages as 8 KiB hold.
    static constexpr uint32_t STAGE_PAGES = PAGE_BYTES > 4096 ? 1 : PAGE_BYTES > 2048 ? 2 : PAGE_BYTES > 1024 ? 4 : 8;
    static constexpr uint32_t STAGE_BYTES = STAGE_PAGES * PAGE_BYTES;
    static constexpr uint32_t STAGES = RUN_RING_BYTES / STAGE_BYTES;
    /// The scores of a page: a thread's four.
    static constexpr uint32_t SCORE_BYTES = 32 * 16;
    static_assert(PAGES % STAGE_PAGES == 0 && STAGES * 8 * RUN_WARPS <= RUN_BARRIER_BYTES);
    static_assert(PAGES * SCORE_BYTES <= RUN_SCORE_BYTES);
};

/// What a warp knows of a run.
struct Run {
    uint32_t kv_head;
    uint32_t row;
    uint32_t span;
    uint32_t context;
    uint32_t table;
    /// First position that the row sees.
    uint32_t first;
    /// The item of the span's split 0, or NO_ITEM: there are no more runs.
    uint32_t item;
    /// The span's first run ends before this split; each later split is a run.
    uint32_t head_end;
    /// Splits `[split, split_end)` are computed.
    uint32_t split;
    uint32_t split_end;
};

/// A warp's ring, and what it asks for next.
template <int HEAD, Kv KV>
struct RunFeed {
    /// Shared addresses of the ring and its barriers.
    uint32_t pages;
    uint32_t barriers;
    uint32_t lane;
    /// Stages asked for and stages used, since the kernel began.
    uint32_t asked;
    uint32_t used;
    /// The run that is asked for. It is `ahead` if the warp still walks the one before, `done` if all of it has been
    /// asked for.
    Run run;
    bool ahead;
    bool done;
    uint32_t split;
    /// First page of the tile, next page, the split's last page plus 1.
    uint32_t tile;
    uint32_t page;
    uint32_t page_end;
    /// 0: keys come next, 1: values.
    uint32_t value;
    /// `page_of` for the split.
    uint32_t number;
};

/// First and last page (plus 1) of a split that are walked.
template <int HEAD>
__device__ __forceinline__ uint2 pages_of(const Run& run, uint32_t split) {
    constexpr uint32_t TILE = tile_keys(HEAD);
    const uint32_t end = min(run.context, (split + 1) * SPLIT_KEYS);
    return {max(split * SPLIT_KEYS, run.first / TILE * TILE) / PAGE_TOKENS, (end + PAGE_TOKENS - 1) / PAGE_TOKENS};
}

/// Looks the run of a unit up. It may be empty, where a window hides it.
__device__ __forceinline__ Run look_up_run(const AttentionArguments& arguments, uint32_t unit) {
    const uint32_t item = arguments.decode_runs[unit / arguments.kv_heads];
    const uint32_t run_splits = arguments.counts->run_splits;
    const DecodeItem work = arguments.decode_items[item];
    const AttentionSpan span = arguments.spans[work.span];
    Run run;
    run.kv_head = unit % arguments.kv_heads;
    run.row = span.first_row;
    run.span = work.span;
    run.context = span.context;
    run.table = span.table;
    run.first = window_first(span.context - 1, arguments.window);
    run.item = item - work.split;
    run.split = max(work.split, run.first / SPLIT_KEYS);
    run.head_end = min(run_splits, (span.context - 1) / SPLIT_KEYS + 1);
    run.split_end = work.split == 0 ? run.head_end : work.split + 1;
    return run;
}

/// The number, in the layer's cache, of this lane's page of keys in a split; that of the values is `cache_heads` greater.
template <int HEAD>
__device__ __forceinline__ uint32_t page_of(const AttentionArguments& arguments, const Run& run, uint2 pages,
                                            uint32_t lane) {
    const uint32_t page = pages.x / SPLIT_PAGES * SPLIT_PAGES + lane;
    if (page < pages.x || page >= pages.y) return 0;
    return arguments.tables[run.table + page] * 2 * arguments.cache_heads + run.kv_head / arguments.parts;
}

/// Begins to ask for the split `feed.split`.
template <int HEAD, Kv KV>
__device__ __forceinline__ void begin_split(RunFeed<HEAD, KV>& feed, const AttentionArguments& arguments) {
    const uint2 pages = pages_of<HEAD>(feed.run, feed.split);
    feed.tile = feed.page = pages.x;
    feed.page_end = pages.y;
    feed.value = 0;
    feed.number = page_of<HEAD>(arguments, feed.run, pages, feed.lane);
}

/// `barrier_expect` and `copy_bulk_once` by one lane of a warp that is whole: the compiler makes a loop of a copy by
/// lanes that it does not know to be one.
__device__ __forceinline__ void expect_elected(uint32_t barrier, uint32_t bytes) {
    asm volatile(
        "{\n.reg .pred chosen;\nelect.sync _|chosen, 0xffffffff;\n"
        "@chosen mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n}" ::"r"(barrier),
        "r"(bytes)
        : "memory");
}

__device__ __forceinline__ void copy_elected(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "{\n.reg .pred chosen;\nelect.sync _|chosen, 0xffffffff;\n"
        "@chosen cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
        "[%3], %4;\n}" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(EVICT_FIRST)
        : "memory");
}

/// Asks for the next stage: of a tile first the keys, then the values.
template <int HEAD, Kv KV>
__device__ __forceinline__ void ask(RunFeed<HEAD, KV>& feed, const AttentionArguments& arguments) {
    using S = RunShape<HEAD, KV>;
    const uint32_t tile_end = min(feed.tile + S::PAGES, feed.page_end);
    const uint32_t live = min(S::STAGE_PAGES, tile_end - feed.page);
    const uint32_t stage = feed.asked % S::STAGES, barrier = feed.barriers + stage * 8;
    const uint32_t to = feed.pages + stage * S::STAGE_BYTES, other = feed.value * arguments.cache_heads;
    expect_elected(barrier, live * S::PAGE_BYTES);
#pragma unroll
    for (uint32_t i = 0; i < S::STAGE_PAGES; ++i) {
        if (i > 0 && i >= live) break;
        const uint32_t number = __shfl_sync(0xffffffffu, feed.number, (feed.page + i) % 32) + other;
        copy_elected(to + i * S::PAGE_BYTES,
                     static_cast<const char*>(arguments.cache) + uint64_t(number) * S::PAGE_BYTES, S::PAGE_BYTES,
                     barrier);
    }
    ++feed.asked;
    feed.page += S::STAGE_PAGES;
    if (feed.page < tile_end) return;
    feed.value ^= 1;
    if (feed.value == 0) feed.tile += S::PAGES;
    feed.page = feed.tile;
    if (feed.tile < feed.page_end) return;
    feed.done = ++feed.split == feed.run.split_end;
    if (!feed.done) begin_split<HEAD, KV>(feed, arguments);
}

/// The next unit of this warp; `units` and more: there are none. Tickets may be those of a launch before this one, until
/// the predecessor has ended.
__device__ __forceinline__ uint32_t draw_run(const AttentionArguments& arguments, uint32_t units, uint32_t lane) {
    await_predecessor();
    uint32_t ticket = 0;
    if (lane == 0) {
        ticket = atomicAdd(arguments.counters, 1);
        // As many tickets are drawn as there are units: one for each unit not dealt, one in vain per warp.
        if (ticket + 1 == units) arguments.counters[0] = 0;
    }
    return min(units, gridDim.x * RUN_WARPS) + __shfl_sync(0xffffffffu, ticket, 0);
}

/// Begins to ask for the run of `unit`, or of the next one that is not empty. Without one, `item` becomes NO_ITEM.
template <int HEAD, Kv KV>
__device__ __forceinline__ void begin_run(RunFeed<HEAD, KV>& feed, const AttentionArguments& arguments, uint32_t unit,
                                          uint32_t units) {
    feed.ahead = true;
    feed.done = true;
    for (; unit < units; unit = draw_run(arguments, units, feed.lane)) {
        feed.run = look_up_run(arguments, unit);
        feed.split = feed.run.split;
        if (feed.split >= feed.run.split_end) continue;
        begin_split<HEAD, KV>(feed, arguments);
        feed.done = false;
        return;
    }
    feed.run.item = NO_ITEM;
}

/// Asks until the ring is full or the run at its end.
template <int HEAD, Kv KV>
__device__ __forceinline__ void fill(RunFeed<HEAD, KV>& feed, const AttentionArguments& arguments) {
    while (!feed.done && feed.asked - feed.used < RunShape<HEAD, KV>::STAGES) ask<HEAD, KV>(feed, arguments);
}

/// Waits for the oldest stage and returns where its pages lie.
template <int HEAD, Kv KV>
__device__ __forceinline__ uint32_t await_stage(const RunFeed<HEAD, KV>& feed) {
    using S = RunShape<HEAD, KV>;
    const uint32_t stage = feed.used % S::STAGES;
    barrier_wait(feed.barriers + stage * 8, feed.used / S::STAGES % 2);
    return feed.pages + stage * S::STAGE_BYTES;
}

/// Gives the oldest stage back, and asks for what comes next: once all of the run that is walked has been asked for, of
/// another.
template <int HEAD, Kv KV>
__device__ __forceinline__ void give_back(RunFeed<HEAD, KV>& feed, const AttentionArguments& arguments,
                                          uint32_t units) {
    __syncwarp();
    ++feed.used;
    if (feed.done && !feed.ahead) begin_run<HEAD, KV>(feed, arguments, draw_run(arguments, units, feed.lane), units);
    fill<HEAD, KV>(feed, arguments);
}

}  // namespace
}  // namespace millrace

#endif
