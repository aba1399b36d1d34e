//! Paged attention for spans of one row (decode) where there are many spans: every warp walks runs of splits alone.
//!
//! A warp merges the splits of a run in registers as it comes to them: that is the merge of `merge_parts`, so what a run
//! leaves is what its splits would have left one by one. Only spans of several runs leave partial results in memory.
//! The loops go over stages and pages, not over copies of their bodies: in a step, other kernels have run before this one,
//! and a multiprocessor fetches its code anew. A tile's scores lie in shared memory, where each thread reads its own.
//!
//! Invariant: the sums of a row are those of `attention_decode_*`, term by term; who walks a run is no part of them.
//! `counters` are zero before and after every launch.

#include "attention_decode_runs.cuh"

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
    /// Shared address of this thread's scores, and then weights, of the tile.
    uint32_t scores;
};

__device__ __forceinline__ void store_scores(uint32_t to, const float (&s)[4]) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(s[0]), "f"(s[1]), "f"(s[2]), "f"(s[3])
                 : "memory");
}

__device__ __forceinline__ void load_scores(float (&s)[4], uint32_t from) {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(s[0]), "=f"(s[1]), "=f"(s[2]), "=f"(s[3])
                 : "r"(from)
                 : "memory");
}

__device__ __forceinline__ void store_weights(uint32_t to, uint2 weights) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(weights.x), "r"(weights.y) : "memory");
}

__device__ __forceinline__ uint2 load_weights(uint32_t from) {
    uint2 weights;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(weights.x), "=r"(weights.y) : "r"(from) : "memory");
    return weights;
}

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

/// Scores of two pages, side by side.
template <int HEAD, Kv KV>
__device__ __forceinline__ void score_pages(float (&s)[2][4], const Walker<HEAD>& me, uint32_t pages, uint32_t lane) {
    constexpr uint32_t PAGE_BYTES = RunShape<HEAD, KV>::PAGE_BYTES;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.f;
    if constexpr (KV == Kv::Bf16) {
#pragma unroll
        for (int step = 0; step < HEAD / 16; ++step) {
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                uint32_t keys[4];
                load_matrices(keys, pages + i * PAGE_BYTES + key_rows<HEAD>(lane, step));
                multiply(s[i], keys, me.query[step][0], me.query[step][1]);
            }
        }
    } else {
#pragma unroll
        for (int step = 0; step < HEAD / 16; step += 2) {
#pragma unroll
            for (uint32_t i = 0; i < 2; ++i) {
                uint32_t codes[4], keys[4];
                load_codes(codes, pages + i * PAGE_BYTES + step * 256 + lane * 16);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    widen_rows(keys, codes[2 * half], codes[2 * half + 1]);
                    multiply(s[i], keys, me.query[step + half][0], me.query[step + half][1]);
                }
            }
        }
    }
}

/// Scores a stage, of which `page` is the first page, as page `at` of the tile, and keeps the greatest score of each row
/// in `tops`. Pages that do not exist hold what an earlier stage left; their scores are hidden.
template <int HEAD, Kv KV>
__device__ __forceinline__ void score_stage(float (&tops)[2], const Walker<HEAD>& me, const Run& run, uint32_t stage,
                                            uint32_t page, uint32_t at, uint32_t lane) {
    using S = RunShape<HEAD, KV>;
    static_assert(S::STAGE_PAGES % 2 == 0);
    const uint32_t key = page * PAGE_TOKENS;
    const bool edge = key < run.first || key + S::STAGE_PAGES * PAGE_TOKENS > run.context;
#pragma unroll 1
    for (uint32_t pair = 0; pair < S::STAGE_PAGES; pair += 2) {
        float s[2][4];
        score_pages<HEAD, KV>(s, me, stage + pair * S::PAGE_BYTES, lane);
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            if (edge) {
                const uint32_t low = key + (pair + i) * PAGE_TOKENS + lane / 4, high = low + 8;
                if (low < run.first || low >= run.context) s[i][0] = s[i][1] = minus_infinity();
                if (high < run.first || high >= run.context) s[i][2] = s[i][3] = minus_infinity();
            }
            tops[0] = fmaxf(tops[0], fmaxf(s[i][0], s[i][2]));
            tops[1] = fmaxf(tops[1], fmaxf(s[i][1], s[i][3]));
            store_scores(me.scores + (at + pair + i) * S::SCORE_BYTES, s[i]);
        }
    }
}

/// Turns the scores of a tile of `pages` pages into weights as the B operand, and scales what the split has accumulated.
/// `tops` are the tile's greatest scores that this thread knows of.
template <int HEAD, Kv KV>
__device__ __forceinline__ void weigh_tile(Walker<HEAD>& me, const float (&tops)[2], uint32_t pages, float scale) {
    float from[2], factors[2], sums[2] = {0.f, 0.f};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float top = tops[row];
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, distance));
        top = fmaxf(me.rows[row].top, __fmul_rn(top, scale));
        from[row] = anchor(top);
        factors[row] = exp2_approx(__fsub_rn(me.rows[row].top, from[row]));
        me.rows[row].top = top;
    }
#pragma unroll 2
    for (uint32_t page = 0; page < pages; ++page) {
        const uint32_t place = me.scores + page * RunShape<HEAD, KV>::SCORE_BYTES;
        float s[4];
        load_scores(s, place);
#pragma unroll
        for (int e = 0; e < 4; ++e) s[e] = exp2_approx(__fmaf_rn(s[e], scale, -from[e % 2]));
#pragma unroll
        for (int row = 0; row < 2; ++row) sums[row] = __fadd_rn(__fadd_rn(sums[row], s[row]), s[2 + row]);
        store_weights(place, {transposed(pack_bf16(s[0], s[1])), transposed(pack_bf16(s[2], s[3]))});
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const float sum = __fadd_rn(sums[row], __shfl_xor_sync(0xffffffffu, sums[row], 4));
        me.rows[row].sum = __fmaf_rn(me.rows[row].sum, factors[row], sum);
    }
#pragma unroll
    for (int part = 0; part < HEAD / 16; ++part) {
#pragma unroll
        for (int e = 0; e < 4; ++e) me.out[part][e] = __fmul_rn(me.out[part][e], factors[e % 2]);
    }
}

/// Adds a page's values by their weights. Of the page's tokens, those from `live` on were never written.
template <int HEAD, Kv KV>
__device__ __forceinline__ void add_page(Walker<HEAD>& me, uint2 weights, uint32_t page, uint32_t live,
                                         uint32_t lane) {
    if constexpr (KV == Kv::Bf16) {
        if (live < PAGE_TOKENS) {
            // Unwritten memory may hold what is no number, and 0 times that is no number either.
            constexpr uint32_t CHUNKS = HEAD / 8;
#pragma unroll 1
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

/// Adds a stage's values; it is as in `score_stage`, and `pages` the tile's.
template <int HEAD, Kv KV>
__device__ __forceinline__ void add_stage(Walker<HEAD>& me, const Run& run, uint32_t stage, uint32_t page, uint32_t at,
                                          uint32_t pages, uint32_t lane) {
    using S = RunShape<HEAD, KV>;
#pragma unroll 1
    for (uint32_t i = 0; i < S::STAGE_PAGES && at + i < pages; ++i) {
        const uint2 weights = load_weights(me.scores + (at + i) * S::SCORE_BYTES);
        const uint32_t live = run.context - (page + i) * PAGE_TOKENS;
        add_page<HEAD, KV>(me, weights, stage + i * S::PAGE_BYTES, live, lane);
    }
}

/// Walks the tile of pages `[first, first + pages)`: its keys, then its values.
template <int HEAD, Kv KV>
__device__ __forceinline__ void walk_tile(Walker<HEAD>& me, RunFeed<HEAD, KV>& feed,
                                          const AttentionArguments& arguments, const Run& run, uint32_t first,
                                          uint32_t pages, uint32_t units) {
    using S = RunShape<HEAD, KV>;
    float tops[2] = {minus_infinity(), minus_infinity()};
    uint32_t at = 0;
#pragma unroll 1
    for (uint32_t value = 0; value < 2;) {
        const uint32_t stage = await_stage<HEAD, KV>(feed);
        if (value == 0) score_stage<HEAD, KV>(tops, me, run, stage, first + at, at, feed.lane);
        else add_stage<HEAD, KV>(me, run, stage, first + at, at, pages, feed.lane);
        give_back<HEAD, KV>(feed, arguments, units);
        at += S::STAGE_PAGES;
        if (at < pages) continue;
        if (value == 0) weigh_tile<HEAD, KV>(me, tops, pages, arguments.scale_log2);
        at = 0;
        ++value;
    }
}

/// Walks one split of a run and merges it onto those before.
template <int HEAD, Kv KV>
__device__ __forceinline__ void walk_split(Walker<HEAD>& me, RunFeed<HEAD, KV>& feed,
                                           const AttentionArguments& arguments, const Run& run, uint32_t split,
                                           uint32_t units) {
    using S = RunShape<HEAD, KV>;
    const uint2 range = pages_of<HEAD>(run, split);
    me.rows[0] = me.rows[1] = empty_row();
#pragma unroll
    for (uint32_t part = 0; part < S::PARTS; ++part)
        me.out[part][0] = me.out[part][1] = me.out[part][2] = me.out[part][3] = 0.f;
#pragma unroll 1
    for (uint32_t page = range.x; page < range.y; page += S::PAGES)
        walk_tile<HEAD, KV>(me, feed, arguments, run, page, min(S::PAGES, range.y - page), units);
    MergeFactors factors[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        me.rows[row].sum = row_sum_transposed(me.rows[row].sum);
        factors[row] = merge_rows(me.total_rows[row], me.rows[row]);
    }
#pragma unroll
    for (uint32_t part = 0; part < S::PARTS; ++part) {
#pragma unroll
        for (int e = 0; e < 4; ++e) me.total[part][e] = merged(me.total[part][e], me.out[part][e], factors[e % 2]);
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
__device__ __forceinline__ void walk_runs(const AttentionArguments& arguments) {
    using S = RunShape<HEAD, KV>;
    extern __shared__ __align__(1024) unsigned char dynamic[];
    const uint32_t memory = shared_address(dynamic), warp = threadIdx.x / 32;
    const uint32_t units = arguments.counts->decode_runs * arguments.kv_heads;
    RunFeed<HEAD, KV> feed = {};
    feed.pages = memory + RUN_BARRIER_BYTES + warp * RUN_RING_BYTES;
    feed.barriers = memory + warp * S::STAGES * 8;
    feed.lane = threadIdx.x % 32;
    Walker<HEAD> me;
    me.scores = memory + RUN_BARRIER_BYTES + RUN_WARPS * RUN_RING_BYTES + warp * RUN_SCORE_BYTES + feed.lane * 16;
    if (feed.lane < S::STAGES) barrier_init(feed.barriers + feed.lane * 8, 1);
    fence_async_proxy();
    __syncwarp();
    release_successor();
    begin_run<HEAD, KV>(feed, arguments, warp * gridDim.x + blockIdx.x, units);
    // The predecessor writes to the span's last page alone, and what fills the ring first lies in these tiles.
    constexpr uint32_t TILES = (S::STAGES * S::STAGE_PAGES + 2 * S::PAGES - 1) / (2 * S::PAGES);
    if (feed.run.context <= (feed.page + TILES * S::PAGES) * PAGE_TOKENS) await_predecessor();
    fill<HEAD, KV>(feed, arguments);
    await_predecessor();
#pragma unroll 1
    while (feed.run.item != NO_ITEM) {
        const Run run = feed.run;
        feed.ahead = false;
        load_queries<HEAD>(me, arguments, run, feed.lane);
        me.total_rows[0] = me.total_rows[1] = empty_row();
#pragma unroll
        for (uint32_t part = 0; part < S::PARTS; ++part)
            me.total[part][0] = me.total[part][1] = me.total[part][2] = me.total[part][3] = 0.f;
#pragma unroll 1
        for (uint32_t split = run.split; split < run.split_end; ++split)
            walk_split<HEAD, KV>(me, feed, arguments, run, split, units);
        close_run<HEAD, KV>(me, arguments, run, feed.lane);
    }
}

}  // namespace
}  // namespace millrace

#define RUNS_BODY(HEAD, KV) millrace::walk_runs<HEAD, millrace::Kv::KV>(arguments)
#else
#define RUNS_BODY(HEAD, KV)
#endif

#define MILLRACE_RUNS(NAME, HEAD, KV)                                                   \
    extern "C" __global__ void __launch_bounds__(millrace::RUN_THREADS, 1)              \
        NAME##HEAD(const __grid_constant__ millrace::AttentionArguments arguments) {    \
        RUNS_BODY(HEAD, KV);                                                            \
    }

MILLRACE_RUNS(attention_decode_runs_h, 64, Bf16)
MILLRACE_RUNS(attention_decode_runs_h, 96, Bf16)
MILLRACE_RUNS(attention_decode_runs_h, 128, Bf16)
MILLRACE_RUNS(attention_decode_runs_fp8_h, 64, Fp8)
MILLRACE_RUNS(attention_decode_runs_fp8_h, 96, Fp8)
MILLRACE_RUNS(attention_decode_runs_fp8_h, 128, Fp8)
