//! Decode attention where there are many spans: every warp walks runs of splits alone.
//!
//! A run is a row of splits of one span, for one key-value head. A warp merges the splits of a run in registers as it
//! comes to them: that is the merge of `merge_parts`, so what a run leaves is what its splits would have left one by one.
//! Only spans of more splits than a run has leave partial results in memory.
//!
//! Invariant: the sums of a row are those of the other form, term by term; who walks a run is no part of them.
#pragma once

#include "attention_decode_feed.cuh"

#ifdef MILLRACE_BULK_COPY

namespace millrace {
namespace {

/// Up to 8 query rows (the group), of which a thread holds `2 * (lane % 4)` and the one after: the queries as the B
/// operand, and what a split, and the run so far, have accumulated.
template <int HEAD>
struct Walker {
    uint32_t query[HEAD / 16][2];
    float out[HEAD / 16][4];
    RowSum rows[2];
    float total[HEAD / 16][4];
    RowSum total_rows[2];
};

/// Loads the group's queries; rows beyond the group are zero.
template <int HEAD>
__device__ __forceinline__ void load_queries(Walker<HEAD>& me, const AttentionArguments& arguments, const Run& run,
                                             uint32_t lane) {
    const bool live = lane / 4 < arguments.group;
    const bf16* from = arguments.queries + uint64_t(run.row) * arguments.query_stride +
                       (run.kv_head * arguments.group + lane / 4) * HEAD + lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < HEAD / 16; ++step) {
        me.query[step][0] = live ? *reinterpret_cast<const uint32_t*>(from + step * 16) : 0;
        me.query[step][1] = live ? *reinterpret_cast<const uint32_t*>(from + step * 16 + 8) : 0;
    }
}

/// Adds a stage's pages to their scores.
template <int HEAD, Kv KV>
__device__ __forceinline__ void score_stage(float (*s)[4], const Walker<HEAD>& me, uint32_t stage, uint32_t lane) {
    using S = RunShape<HEAD, KV>;
    if constexpr (KV == Kv::Bf16) {
#pragma unroll
        for (int step = 0; step < HEAD / 16; ++step) {
#pragma unroll
            for (uint32_t i = 0; i < S::STAGE_PAGES; ++i) {
                uint32_t keys[4];
                load_matrices(keys, stage + i * S::PAGE_BYTES + key_rows<HEAD>(lane, step));
                multiply(s[i], keys, me.query[step][0], me.query[step][1]);
            }
        }
    } else {
#pragma unroll
        for (int step = 0; step < HEAD / 16; step += 2) {
#pragma unroll
            for (uint32_t i = 0; i < S::STAGE_PAGES; ++i) {
                uint32_t codes[4], keys[4];
                load_codes(codes, stage + i * S::PAGE_BYTES + step * 256 + lane * 16);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    widen_rows(keys, codes[2 * half], codes[2 * half + 1]);
                    multiply(s[i], keys, me.query[step + half][0], me.query[step + half][1]);
                }
            }
        }
    }
}

/// Adds the page's values by their weights. Of the page's tokens, those from `live` on were never written.
template <int HEAD, Kv KV>
__device__ __forceinline__ void add_values(Walker<HEAD>& me, uint2 weights, uint32_t page, uint32_t live,
                                                uint32_t lane) {
    if constexpr (KV == Kv::Bf16) {
        if (live < PAGE_TOKENS) {
            // Unwritten memory may hold what is no number, and 0 times that is no number either.
            constexpr uint32_t CHUNKS = HEAD / 8;
            for (uint32_t at = lane; at < (PAGE_TOKENS - live) * CHUNKS; at += 32)
                store16_shared(page + page_offset(HEAD, live + at / CHUNKS, at % CHUNKS * 8) * 2,
                               make_uint4(0, 0, 0, 0));
            fence_async_proxy();
            __syncwarp();
        }
#pragma unroll
        for (int part = 0; part < HEAD / 16; ++part) {
            uint32_t values[4];
            load_matrices_transposed(values, page + value_rows<HEAD>(lane, part));
            multiply(me.out[part], values, weights.x, weights.y);
        }
    } else {
        const uint32_t keep = live < PAGE_TOKENS ? live_codes(lane, live) : 0xffffffffu;
#pragma unroll
        for (int part = 0; part < HEAD / 16; part += 2) {
            uint32_t codes[4], values[4];
            load_codes(codes, page + part * 256 + lane * 16);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                widen_rows(values, codes[2 * half] & keep, codes[2 * half + 1] & keep);
                multiply(me.out[part + half], values, weights.x, weights.y);
            }
        }
    }
}

/// Scores of the tile of pages `[page, page_end)`, softened: the weights as the B operand of each page. Returns the
/// factors of the split's result so far.
template <int HEAD, Kv KV>
__device__ __forceinline__ float2 weigh_tile(uint2 (&weights)[RunShape<HEAD, KV>::PAGES], Walker<HEAD>& me,
                                             Feed<HEAD, KV>& feed, const AttentionArguments& arguments,
                                             const Run& run, uint32_t page, uint32_t pages) {
    using S = RunShape<HEAD, KV>;
    float s[S::PAGES][4] = {};
#pragma unroll
    for (uint32_t step = 0; step < S::STEPS; ++step) {
        if (step * S::STAGE_PAGES >= pages) break;
        const uint32_t stage = await_stage<HEAD, KV>(feed);
        // Pages that do not exist hold what an earlier stage left; their scores are hidden.
        score_stage<HEAD, KV>(s + step * S::STAGE_PAGES, me, stage, feed.lane);
        give_back<HEAD, KV>(feed, arguments);
    }
    const uint32_t key = page * PAGE_TOKENS;
    if (key < run.first || key + tile_keys(HEAD) > run.context) {
#pragma unroll
        for (uint32_t i = 0; i < S::PAGES; ++i) {
            const uint32_t low = key + i * PAGE_TOKENS + feed.lane / 4, high = low + 8;
            if (low < run.first || low >= run.context) s[i][0] = s[i][1] = minus_infinity();
            if (high < run.first || high >= run.context) s[i][2] = s[i][3] = minus_infinity();
        }
    }
    const float scale = arguments.scale_log2;
    const float tops[2] = {fmaxf(me.rows[0].top, __fmul_rn(tile_max_transposed<S::PAGES, 0>(s), scale)),
                           fmaxf(me.rows[1].top, __fmul_rn(tile_max_transposed<S::PAGES, 1>(s), scale))};
    const float2 sums = {soften_transposed<S::PAGES, 0>(s, anchor(tops[0]), scale),
                         soften_transposed<S::PAGES, 1>(s, anchor(tops[1]), scale)};
    float factors[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        factors[row] = exp2_approx(__fsub_rn(me.rows[row].top, anchor(tops[row])));
        me.rows[row].top = tops[row];
        me.rows[row].sum = __fmaf_rn(me.rows[row].sum, factors[row], row == 0 ? sums.x : sums.y);
    }
#pragma unroll
    for (uint32_t i = 0; i < S::PAGES; ++i)
        weights[i] = {transposed(pack_bf16(s[i][0], s[i][1])), transposed(pack_bf16(s[i][2], s[i][3]))};
    return {factors[0], factors[1]};
}

/// One split of a run. With the scores of a run's last tile known, all that is left of it has been asked for, if the
/// ring holds a tile's values; else with its values taken. Then the next run begins to be asked for.
template <int HEAD, Kv KV>
__device__ __forceinline__ void walk_split(Walker<HEAD>& me, Feed<HEAD, KV>& feed, const AttentionArguments& arguments,
                                           const Run& run, uint32_t split, uint32_t units) {
    using S = RunShape<HEAD, KV>;
    const uint2 range = pages_of<HEAD>(run, split);
    me.rows[0] = me.rows[1] = empty_row();
#pragma unroll
    for (uint32_t part = 0; part < S::PARTS; ++part)
        me.out[part][0] = me.out[part][1] = me.out[part][2] = me.out[part][3] = 0.f;
    for (uint32_t page = range.x; page < range.y; page += S::PAGES) {
        const uint32_t pages = min(S::PAGES, range.y - page);
        uint2 weights[S::PAGES];
        const float2 factors = weigh_tile<HEAD, KV>(weights, me, feed, arguments, run, page, pages);
        follow_up<HEAD, KV>(feed, arguments, units);
#pragma unroll
        for (uint32_t part = 0; part < S::PARTS; ++part) {
#pragma unroll
            for (int e = 0; e < 4; ++e) me.out[part][e] = __fmul_rn(me.out[part][e], e % 2 ? factors.y : factors.x);
        }
#pragma unroll
        for (uint32_t step = 0; step < S::STEPS; ++step) {
            if (step * S::STAGE_PAGES >= pages) break;
            const uint32_t stage = await_stage<HEAD, KV>(feed);
#pragma unroll
            for (uint32_t i = 0; i < S::STAGE_PAGES; ++i) {
                const uint32_t at = step * S::STAGE_PAGES + i;
                if (at >= pages) break;
                const uint32_t live = min(PAGE_TOKENS, run.context - (page + at) * PAGE_TOKENS);
                add_values<HEAD, KV>(me, weights[at], stage + i * S::PAGE_BYTES, live, feed.lane);
            }
            give_back<HEAD, KV>(feed, arguments);
        }
        if (S::STEPS > S::STAGES) follow_up<HEAD, KV>(feed, arguments, units);
    }
#pragma unroll
    for (RowSum& row : me.rows) row.sum = row_sum_transposed(row.sum);
}

/// Merges the split just walked onto the run's earlier ones. The first is taken as it is: merging it onto nothing
/// changes no more than the sign of a zero.
template <int HEAD>
__device__ __forceinline__ void fold(Walker<HEAD>& me, bool first) {
    MergeFactors factors[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        if (first) me.total_rows[row] = me.rows[row];
        else factors[row] = merge_rows(me.total_rows[row], me.rows[row]);
    }
#pragma unroll
    for (int part = 0; part < HEAD / 16; ++part) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            me.total[part][e] = first ? me.out[part][e] : merged(me.total[part][e], me.out[part][e], factors[e % 2]);
    }
}

/// Writes the output of a run that is all of its span.
template <int HEAD, Kv KV>
__device__ __forceinline__ void store_run(const Walker<HEAD>& me, const AttentionArguments& arguments, const Run& run,
                                          uint32_t lane) {
    const float inverse[2] = {output_factor<KV>(me.total_rows[0].sum, arguments),
                              output_factor<KV>(me.total_rows[1].sum, arguments)};
    bf16* to = arguments.out + uint64_t(run.row) * arguments.out_stride +
               (run.kv_head * arguments.group + lane / 4) * HEAD + lane % 4 * 2;
#pragma unroll
    for (int part = 0; part < HEAD / 16; ++part) {
        const float(&out)[4] = me.total[part];
        const uint32_t low = transposed(pack_bf16(finished(out[0], inverse[0]), finished(out[1], inverse[1])));
        const uint32_t high = transposed(pack_bf16(finished(out[2], inverse[0]), finished(out[3], inverse[1])));
        if (lane / 4 >= arguments.group) continue;
        *reinterpret_cast<uint32_t*>(to + part * 16) = low;
        *reinterpret_cast<uint32_t*>(to + part * 16 + 8) = high;
    }
}

/// Stores what a run has accumulated under the item of its last split.
template <int HEAD>
__device__ __forceinline__ void store_partial_run(const Walker<HEAD>& me, const AttentionArguments& arguments,
                                                  const Run& run, uint32_t lane) {
    const uint32_t heads = arguments.kv_heads * arguments.group;
    float* stats = arguments.partials + uint64_t(arguments.items_max) * heads * HEAD;
#pragma unroll
    for (uint32_t row = 0; row < 2; ++row) {
        const uint32_t head = lane % 4 * 2 + row;
        if (head >= arguments.group) continue;
        const uint64_t place = uint64_t(run.item + run.split_end - 1) * heads + run.kv_head * arguments.group + head;
        float* to = arguments.partials + place * HEAD + lane / 4;
#pragma unroll
        for (int part = 0; part < HEAD / 16; ++part) {
            to[part * 16] = me.total[part][row];
            to[part * 16 + 8] = me.total[part][2 + row];
        }
        if (lane < 4)
            *reinterpret_cast<float2*>(stats + place * 2) = make_float2(me.total_rows[row].top, me.total_rows[row].sum);
    }
}

/// Stores a run's result; the last of a span's runs merges them all.
template <int HEAD, Kv KV>
__device__ __forceinline__ void close_run(const Walker<HEAD>& me, const AttentionArguments& arguments, const Run& run,
                                          uint32_t lane) {
    const uint32_t splits = (run.context - 1) / SPLIT_KEYS + 1, split_first = run.first / SPLIT_KEYS;
    // The results in memory: of the first run that sees anything, and of each split after it.
    const uint32_t first_end = max(run.head_end, split_first + 1), parts = splits - first_end + 1;
    if (parts == 1) return store_run<HEAD, KV>(me, arguments, run, lane);
    store_partial_run<HEAD>(me, arguments, run, lane);
    __threadfence();
    __syncwarp();
    uint32_t* counter = arguments.counters + 1 + run.span * arguments.kv_heads + run.kv_head;
    uint32_t ended = 0;
    if (lane == 0) ended = atomicAdd(counter, 1) + 1;
    if (__shfl_sync(0xffffffffu, ended, 0) != parts) return;
    __threadfence();
    if (lane == 0) *counter = 0;
    merge_parts<HEAD, KV, 32>(arguments, {run.item + first_end - 1, parts, run.row, run.kv_head}, lane);
}

/// A warp: run after run, the first by place, the others by ticket.
template <int HEAD, Kv KV>
__device__ __forceinline__ void walk_runs(const AttentionArguments& arguments, uint32_t memory) {
    const uint32_t units = arguments.counts->decode_runs * arguments.kv_heads, warp = threadIdx.x / 32;
    Feed<HEAD, KV> feed = {};
    feed.pages = memory + RUN_BARRIER_BYTES + warp * RUN_RING_BYTES;
    feed.barriers = memory + warp * RunShape<HEAD, KV>::STAGES * 8;
    feed.lane = threadIdx.x % 32;
    if (feed.lane < RunShape<HEAD, KV>::STAGES) barrier_init(feed.barriers + feed.lane * 8, 1);
    fence_async_proxy();
    __syncwarp();
    begin_run<HEAD, KV>(feed, arguments, warp * gridDim.x + blockIdx.x, units);
    await_predecessor();
    fill<HEAD, KV>(feed, arguments);
    Walker<HEAD> me;
    while (feed.run.item != NO_ITEM) {
        const Run run = feed.run;
        feed.ahead = false;
        load_queries<HEAD>(me, arguments, run, feed.lane);
        for (uint32_t split = run.split; split < run.split_end; ++split) {
            walk_split<HEAD, KV>(me, feed, arguments, run, split, units);
            fold<HEAD>(me, split == run.split);
        }
        close_run<HEAD, KV>(me, arguments, run, feed.lane);
    }
}

/// Whether every warp walks runs of its own: that takes enough of them for all multiprocessors. The form changes no
/// byte.
template <Kv KV>
__device__ __forceinline__ bool many_runs(const AttentionArguments& arguments) {
    return arguments.counts->decode_runs * arguments.kv_heads >= runs_per_cta_min(KV) * gridDim.x;
}

}  // namespace
}  // namespace millrace

#endif
