//! How a prefill is computed with mma.sync: sm_80 and up, every head size.
//!
//! A CTA takes one tile of packed rows (rows times the group's heads) of one key-value head; a warp has 16 of
//! them. Keys of tile t+1 are copied while values of tile t are multiplied, and values of t while its scores are.
//! At each multiple of `SPLIT_KEYS` the running result is merged into the total, which lies in shared memory,
//! each thread its own part.
//!
//! Invariant: the bytes of a row are those that `attention_decode_*` gives.
#pragma once

#include "attention_prefill.cuh"

namespace millrace {
namespace {

/// What a kernel is made for. A `SMALL` one has one place for keys and values, which take turns there.
template <int HEAD_, Kv KV_, bool SMALL_>
struct Shape {
    static constexpr int HEAD = HEAD_;
    static constexpr Kv KV = KV_;
    static constexpr bool SMALL = SMALL_;
    static constexpr uint32_t ROWS = SMALL ? prefill_small_tile_rows(HEAD) : prefill_tile_rows(HEAD);
    static constexpr uint32_t THREADS = SMALL ? prefill_small_threads(HEAD) : prefill_threads(HEAD);
    static constexpr uint32_t KEYS = tile_keys(HEAD);
    static constexpr uint32_t COLUMNS = KEYS / 8;
    static constexpr uint32_t PAGES = KEYS / PAGE_TOKENS;
    /// Bytes of a page of 16 packed rows, and of one of the cache; codes take half of the room of bf16.
    static constexpr uint32_t PAGE_BYTES = PAGE_TOKENS * HEAD * 2;
    static constexpr uint32_t CACHE_PAGE_BYTES = PAGE_TOKENS * HEAD * element_bytes(KV);
    // Shared memory, in bytes: queries as pages of 16 packed rows, keys, values, totals.
    static constexpr uint32_t KEY_AT = ROWS * HEAD * 2;
    static constexpr uint32_t VALUE_AT = SMALL ? KEY_AT : KEY_AT + KEYS * HEAD * 2;
    static constexpr uint32_t TOTAL_AT = VALUE_AT + KEYS * HEAD * 2;
    static_assert(TOTAL_AT + ROWS * HEAD * 4 ==
                  (SMALL ? prefill_small_shared_bytes(HEAD) : prefill_shared_bytes(HEAD)));
    static_assert(!SMALL || TOTAL_AT + ROWS * HEAD * 4 <= 99 * 1024);
};

/// The state of a warp: 16 packed rows, of which a thread holds `lane / 4` and that plus 8.
template <int HEAD>
struct Unit {
    float out[HEAD / 8][4];
    RowPair rows;
};

/// Starts copying the tile's queries, 16 rows to a page.
template <class S>
__device__ __forceinline__ void copy_queries(const AttentionArguments& arguments, const Work& work, uint32_t shared) {
    constexpr uint32_t CHUNKS = S::HEAD / 8;
    for (uint32_t at = threadIdx.x; at < S::ROWS * CHUNKS; at += S::THREADS) {
        const uint32_t row = at / CHUNKS, d = at % CHUNKS * 8;
        const uint32_t to = shared + row / 16 * S::PAGE_BYTES + page_offset(S::HEAD, row % 16, d) * 2;
        const uint32_t packed = work.packed_first + row;
        if (packed < work.packed_rows)
            copy16_async(to, arguments.queries +
                                 row_place<S::HEAD>(arguments, work, packed, arguments.query_stride) + d);
        else
            store16_shared(to, make_uint4(0, 0, 0, 0));
    }
}

/// Starts copying the pages of a tile of keys (`value` 0) or values (1).
template <class S>
__device__ __forceinline__ void copy_tile(const AttentionArguments& arguments, const Work& work, uint32_t value,
                                          uint32_t tile, uint32_t to) {
    constexpr uint32_t CHUNKS = S::CACHE_PAGE_BYTES / 16;
    const uint32_t first = tile * S::PAGES;
    const uint32_t pages = min(S::PAGES, work.position_last / PAGE_TOKENS + 1 - first);
    // Several copies at a time would take registers that few threads with large heads do not have.
#pragma unroll(S::SMALL ? 1 : 4)
    for (uint32_t at = threadIdx.x; at < pages * CHUNKS; at += S::THREADS) {
        const uint32_t block = arguments.tables[work.span.table + first + at / CHUNKS];
        const char* page = page_address<S::HEAD, S::KV>(arguments, block, value, work.kv_head);
        copy16_async(to + at * 16, page + at % CHUNKS * 16);
    }
}

/// Clears the values of a tile from token `first` on: unwritten memory may hold what is no number, and 0 times
/// that is no number either.
template <class S>
__device__ __forceinline__ void clear_tokens(uint32_t values, uint32_t first) {
    constexpr uint32_t CHUNKS = S::HEAD / 8;
    for (uint32_t at = threadIdx.x; at < (S::KEYS - first) * CHUNKS; at += S::THREADS) {
        const uint32_t token = first + at / CHUNKS;
        store16_shared(values + token / 16 * S::PAGE_BYTES +
                           page_offset(S::HEAD, token % 16, at % CHUNKS * 8) * 2,
                       make_uint4(0, 0, 0, 0));
    }
}

/// `s = Q * K^T` for a tile of keys in codes.
template <class S>
__device__ __forceinline__ void multiply_key_codes(float (&s)[S::COLUMNS][4], uint32_t queries,
                                                   uint32_t keys, uint32_t lane) {
#pragma unroll
    for (uint32_t step = 0; step < S::HEAD / 16; ++step) {
        uint32_t q[4];
        load_matrices(q, queries + key_rows<S::HEAD>(lane, step));
#pragma unroll
        for (uint32_t page = 0; page < S::PAGES; ++page) {
            uint32_t codes[2], k[4];
            load_codes(codes, keys + page * S::CACHE_PAGE_BYTES + step * 256 + lane % 16 * 16);
            widen_rows(k, codes[0], codes[1]);
            multiply(s[2 * page], q, k[0], k[2]);
            multiply(s[2 * page + 1], q, k[1], k[3]);
        }
    }
}

/// `o += p * V` for the 16 keys of a page of codes; `live` has ones where codes are those of tokens that exist.
template <class S>
__device__ __forceinline__ void accumulate_codes(float (&o)[S::HEAD / 8][4], const uint32_t (&p)[4], uint32_t page,
                                                 uint32_t lane, uint32_t live) {
#pragma unroll
    for (int group = 0; group < S::HEAD / 16; ++group) {
        uint32_t codes[2], v[4];
        load_codes(codes, page + group * 256 + lane % 16 * 16);
        widen_rows(v, codes[0] & live, codes[1] & live);
        multiply(o[2 * group], p, v[0], v[2]);
        multiply(o[2 * group + 1], p, v[1], v[3]);
    }
}

/// Scores of a tile and, from them, weights; rescales what the rows have accumulated.
template <class S>
__device__ __forceinline__ void score_tile(float (&s)[S::COLUMNS][4], Unit<S::HEAD>& unit, const Work& work,
                                           uint32_t tile, uint32_t shared, const AttentionArguments& arguments) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < int(S::COLUMNS); ++j) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.f;
    if constexpr (S::KV == Kv::Bf16) {
#pragma unroll
        for (uint32_t step = 0; step < S::HEAD / 16; ++step) {
            uint32_t q[4];
            // The four 8 x 8 matrices of A stand as those of V do: rows 0 and 8, then the next 8 elements.
            load_matrices(q, shared + warp * S::PAGE_BYTES + key_rows<S::HEAD>(lane, step));
#pragma unroll
            for (uint32_t page = 0; page < S::PAGES; ++page)
                score_step<S::HEAD>(s[2 * page], s[2 * page + 1], q, shared + S::KEY_AT + page * S::PAGE_BYTES, lane,
                                 step);
        }
    } else {
        multiply_key_codes<S>(s, shared + warp * S::PAGE_BYTES, shared + S::KEY_AT, lane);
    }
    const uint32_t key = tile * S::KEYS;
    if (key + S::KEYS > work.position_first + 1 || arguments.window != 0) {
        hide<S::COLUMNS, 0>(s, key + lane % 4 * 2, unit.rows.first[0], unit.rows.end[0]);
        hide<S::COLUMNS, 1>(s, key + lane % 4 * 2, unit.rows.first[1], unit.rows.end[1]);
    }
    cap_scores(s, arguments);
    const float factors[2] = {soften<S::COLUMNS, 0>(s, unit.rows.split[0], arguments.scale_log2),
                              soften<S::COLUMNS, 1>(s, unit.rows.split[1], arguments.scale_log2)};
#pragma unroll
    for (int j = 0; j < S::HEAD / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) unit.out[j][e] = __fmul_rn(unit.out[j][e], factors[e / 2]);
    }
}

/// Adds a tile's weighted values; `live` of its tokens exist.
template <class S>
__device__ __forceinline__ void accumulate_tile(const float (&s)[S::COLUMNS][4], Unit<S::HEAD>& unit,
                                                uint32_t shared, uint32_t live) {
#pragma unroll
    for (uint32_t page = 0; page < S::PAGES; ++page) {
        const float(&a)[4] = s[2 * page];
        const float(&b)[4] = s[2 * page + 1];
        const uint32_t weights[4] = {pack_bf16(a[0], a[1]), pack_bf16(a[2], a[3]), pack_bf16(b[0], b[1]),
                                     pack_bf16(b[2], b[3])};
        if constexpr (S::KV == Kv::Bf16) {
            accumulate_page<S::HEAD>(unit.out, weights, shared + S::VALUE_AT + page * S::PAGE_BYTES, threadIdx.x % 32);
        } else {
            const uint32_t values = shared + S::VALUE_AT + page * S::CACHE_PAGE_BYTES, lane = threadIdx.x % 32;
            const uint32_t first = page * PAGE_TOKENS;
            accumulate_codes<S>(unit.out, weights, values, lane, live_codes(lane, live > first ? live - first : 0));
        }
    }
}

template <class S>
__device__ __forceinline__ void prefill(const AttentionArguments& arguments) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const uint32_t shared = shared_address(memory);
    float4* totals = reinterpret_cast<float4*>(memory + S::TOTAL_AT) + threadIdx.x;
    release_successor();
    if (blockIdx.y >= arguments.counts->prefill_tiles) return await_predecessor();
    const Work work = find_work<S::ROWS>(arguments, arguments.prefill_tiles[blockIdx.y], blockIdx.x);
    const uint32_t row = work.packed_first + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    Unit<S::HEAD> unit;
    unit.rows = begin_rows(arguments, work, row);
    clear<S::HEAD>(unit.out);
    await_predecessor();
    const uint32_t first = window_first(work.position_first, arguments.window) / S::KEYS;
    const uint32_t last = work.position_last / S::KEYS;
    copy_queries<S>(arguments, work, shared);
    copy_tile<S>(arguments, work, 0, first, shared + S::KEY_AT);
    commit_copies();
    bool first_split = true;
    for (uint32_t tile = first; tile <= last; ++tile) {
        float s[S::COLUMNS][4];
        await_copies<0>();
        __syncthreads();
        if (!S::SMALL) copy_tile<S>(arguments, work, 1, tile, shared + S::VALUE_AT);
        commit_copies();
        score_tile<S>(s, unit, work, tile, shared, arguments);
        if constexpr (S::SMALL) {
            __syncthreads();
            copy_tile<S>(arguments, work, 1, tile, shared + S::VALUE_AT);
            commit_copies();
        }
        await_copies<0>();
        __syncthreads();
        if (!S::SMALL && tile < last) copy_tile<S>(arguments, work, 0, tile + 1, shared + S::KEY_AT);
        commit_copies();
        const uint32_t live = min(work.span.context, (work.position_last / PAGE_TOKENS + 1) * PAGE_TOKENS);
        if (S::KV == Kv::Bf16 && live < (tile + 1) * S::KEYS) {
            clear_tokens<S>(shared + S::VALUE_AT, live - tile * S::KEYS);
            __syncthreads();
        }
        accumulate_tile<S>(s, unit, shared, live - tile * S::KEYS);
        if (tile == last || (tile + 1) * S::KEYS % SPLIT_KEYS == 0) {
            end_split<S::HEAD, S::THREADS>(unit.out, unit.rows.split, unit.rows.total, totals, first_split, tile == last);
            first_split = false;
        }
        if constexpr (S::SMALL) {
            __syncthreads();
            if (tile < last) copy_tile<S>(arguments, work, 0, tile + 1, shared + S::KEY_AT);
            commit_copies();
        }
    }
    store_output<S::HEAD, S::KV>(unit.out, unit.rows, arguments, work, row);
}

}  // namespace
}  // namespace millrace

#define MILLRACE_PREFILL(NAME, HEAD, KV, SMALL)                                                       \
    extern "C" __global__ void                                                                        \
        __launch_bounds__(millrace::Shape<HEAD, millrace::Kv::KV, SMALL>::THREADS, 1)                 \
        NAME##HEAD(const __grid_constant__ millrace::AttentionArguments arguments) {                  \
        millrace::prefill<millrace::Shape<HEAD, millrace::Kv::KV, SMALL>>(arguments);                 \
    }
