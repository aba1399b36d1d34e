//! Paged attention for spans of any number of rows on sm_90a: wgmma, and a warp that feeds it.
//!
//! A CTA is persistent. Its producer warp copies pages, as they lie in the cache, into two stages of keys and two
//! of values; two warpgroups have 64 packed rows each. A warpgroup asks for the scores of tile t+1, then for the
//! weighted values of tile t, and softens the former while the latter are computed.
//!
//! Invariant: the bytes of a row are those that `attention_decode_*` and `attention_prefill_*` give; it holds
//! because wgmma and mma.sync sum the 16 products of a step alike, which the benchmark program checks.

#include "attention_prefill.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

namespace millrace {
namespace {

template <int HEAD>
struct Shape {
    static_assert(HEAD == 64 || HEAD == 128);
    static constexpr uint32_t KEYS = 128;
    static_assert(tile_keys(HEAD) == KEYS && prefill_tile_rows(HEAD) == 128);
    static constexpr uint32_t PAGES = KEYS / PAGE_TOKENS;
    static constexpr uint32_t PAGE_BYTES = PAGE_TOKENS * HEAD * 2;
    /// Columns of 64 elements in a head, and the bytes of one of them of a whole tile and of one page.
    static constexpr uint32_t PARTS = HEAD / 64;
    static constexpr uint32_t PART_BYTES = KEYS * 128;
    static constexpr uint32_t PAGE_PART_BYTES = PAGE_TOKENS * 128;
    static constexpr uint32_t TILE_BYTES = PARTS * PART_BYTES;
    static constexpr uint32_t STAGES = 2;
    // Shared memory, in bytes from a multiple of 1024 on.
    static constexpr uint32_t QUERY_AT = 1024;
    static constexpr uint32_t KEY_AT = QUERY_AT + 128 * HEAD * 2;
    static constexpr uint32_t VALUE_AT = KEY_AT + STAGES * TILE_BYTES;
    static constexpr uint32_t TOTAL_AT = VALUE_AT + STAGES * TILE_BYTES;
};

/// The barriers at the start of shared memory: 8 bytes each, one per stage.
enum : uint32_t { KEYS_FULL = 0, KEYS_FREE = 16, VALUES_FULL = 32, VALUES_FREE = 48 };

__device__ __forceinline__ void fence_wgmma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int LEFT>
__device__ __forceinline__ void await_wgmma() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

/// Describes an operand in 128-byte swizzle to wgmma. `leading` is the distance of 64-element columns where the
/// operand is transposed; 8 rows are 1024 bytes.
__device__ __forceinline__ uint64_t operand(uint32_t address, uint32_t leading) {
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

#define MILLRACE_D4(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define MILLRACE_D16(d, j) MILLRACE_D4(d, j), MILLRACE_D4(d, j + 1), MILLRACE_D4(d, j + 2), MILLRACE_D4(d, j + 3)

/// `d = a * b` or `d += a * b`: 64 rows, 128 columns, 16 deep, both operands in shared memory.
__device__ __forceinline__ void multiply_wide(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, add, 1, 1, 0, 0;\n}"
        : MILLRACE_D16(d, 0), MILLRACE_D16(d, 4), MILLRACE_D16(d, 8), MILLRACE_D16(d, 12)
        : "l"(a), "l"(b), "r"(int(add)));
}

/// `d += a * b`: 64 rows, 128 columns, 16 deep, `a` in registers, `b` transposed in shared memory.
__device__ __forceinline__ void multiply_transposed(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
        : MILLRACE_D16(d, 0), MILLRACE_D16(d, 4), MILLRACE_D16(d, 8), MILLRACE_D16(d, 12)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/// The same with 64 columns.
__device__ __forceinline__ void multiply_transposed(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : MILLRACE_D16(d, 0), MILLRACE_D16(d, 4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/// The `round`-th unit of this CTA: forth and back over the CTAs, so that the longest units, which come first, are
/// spread evenly.
__device__ __forceinline__ uint32_t unit_of(uint32_t round) {
    const uint32_t place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    return round * gridDim.x + place;
}

/// The tiles of keys that a unit goes through.
struct Range {
    uint32_t first;
    uint32_t last;
};

template <int HEAD>
__device__ __forceinline__ Range tiles_of(const AttentionArguments& arguments, const Work& work) {
    return {window_first(work.position_first, arguments.window) / Shape<HEAD>::KEYS,
            work.position_last / Shape<HEAD>::KEYS};
}

/// Starts copying a tile's pages, one piece of 2 KiB per lane, when its stage is free.
template <int HEAD>
__device__ __forceinline__ void feed(uint32_t shared, uint32_t tile_at, uint32_t full_at, uint32_t free_at,
                                     uint32_t count, const bf16* from, uint32_t pages) {
    using S = Shape<HEAD>;
    const uint32_t lane = threadIdx.x % 32, stage = count % S::STAGES;
    const uint32_t full = shared + full_at + stage * 8;
    barrier_wait(shared + free_at + stage * 8, count / S::STAGES % 2 ^ 1);
    if (lane == 0) barrier_expect(full, pages * S::PAGE_BYTES);
    __syncwarp();
    if (lane < pages * S::PARTS)
        copy_bulk(shared + tile_at + stage * S::TILE_BYTES + lane % S::PARTS * S::PART_BYTES +
                      lane / S::PARTS * S::PAGE_PART_BYTES,
                  from, S::PAGE_PART_BYTES, full);
}

/// The producer warp: all tiles of all units of the CTA, in order.
template <int HEAD>
__device__ __forceinline__ void produce(const AttentionArguments& arguments, uint32_t shared, uint32_t units) {
    using S = Shape<HEAD>;
    const uint32_t lane = threadIdx.x % 32;
    uint32_t count = 0;
    for (uint32_t round = 0, unit = unit_of(0); unit < units; unit = unit_of(++round)) {
        const Work work = find_work<HEAD>(arguments, arguments.prefill_tiles[unit / arguments.kv_heads],
                                          unit % arguments.kv_heads);
        const Range tiles = tiles_of<HEAD>(arguments, work);
        for (uint32_t tile = tiles.first; tile <= tiles.last; ++tile, ++count) {
            const uint32_t first = tile * S::PAGES;
            const uint32_t pages = min(S::PAGES, work.position_last / PAGE_TOKENS + 1 - first);
            const uint32_t page = min(first + lane / S::PARTS, work.position_last / PAGE_TOKENS);
            const uint32_t block = arguments.tables[work.span.table + page];
            const bf16* keys = static_cast<const bf16*>(arguments.cache) +
                               page_start(block, 0, arguments.kv_heads, work.kv_head, HEAD) +
                               lane % S::PARTS * (S::PAGE_PART_BYTES / 2);
            const bf16* values = keys + uint64_t(arguments.kv_heads) * PAGE_TOKENS * HEAD;
            feed<HEAD>(shared, S::KEY_AT, KEYS_FULL, KEYS_FREE, count, keys, pages);
            feed<HEAD>(shared, S::VALUE_AT, VALUES_FULL, VALUES_FREE, count, values, pages);
        }
    }
}

/// A warpgroup's state.
template <int HEAD>
struct Group {
    float s[16][4];
    float out[HEAD / 8][4];
    RowPair rows;
    uint32_t shared;
    /// 0 or 1, and the thread in it.
    uint32_t index;
    uint32_t thread;
    /// Tiles so far.
    uint32_t count;
};

template <int HEAD>
__device__ __forceinline__ uint32_t queries_at(const Group<HEAD>& group) {
    return group.shared + Shape<HEAD>::QUERY_AT + group.index * 64 * HEAD * 2;
}

/// Copies the warpgroup's 64 packed queries to shared memory, in the swizzle of wgmma.
template <int HEAD>
__device__ __forceinline__ void load_queries(const Group<HEAD>& group, const AttentionArguments& arguments,
                                             const Work& work) {
    constexpr uint32_t CHUNKS = HEAD / 8;
#pragma unroll
    for (uint32_t round = 0; round < 64 * CHUNKS / 128; ++round) {
        const uint32_t at = round * 128 + group.thread, row = at / CHUNKS, chunk = at % CHUNKS;
        const uint32_t packed = work.packed_first + group.index * 64 + row;
        uint4 piece = make_uint4(0, 0, 0, 0);
        if (packed < work.packed_rows)
            piece = *reinterpret_cast<const uint4*>(
                arguments.queries + row_place<HEAD>(arguments, work, packed, arguments.query_stride) + chunk * 8);
        store16_shared(queries_at(group) + chunk / 8 * (64 * 128) + row * 128 + (chunk % 8 ^ row % 8) * 16, piece);
    }
    fence_async_proxy();
    if (group.index == 0) asm volatile("bar.sync 2, 128;" ::: "memory");
    else asm volatile("bar.sync 3, 128;" ::: "memory");
}

/// Starts `s = q * K^T` for the tile of number `count`.
template <int HEAD>
__device__ __forceinline__ void start_scores(Group<HEAD>& group, uint32_t count) {
    using S = Shape<HEAD>;
    const uint32_t stage = count % S::STAGES;
    barrier_wait(group.shared + KEYS_FULL + stage * 8, count / S::STAGES % 2);
    const uint32_t keys = group.shared + S::KEY_AT + stage * S::TILE_BYTES;
    fence_wgmma();
#pragma unroll
    for (uint32_t step = 0; step < HEAD / 16; ++step) {
        const uint32_t part = step / 4, inside = step % 4 * 32;
        multiply_wide(group.s, operand(queries_at(group) + part * (64 * 128) + inside, 16),
                      operand(keys + part * S::PART_BYTES + inside, 16), step != 0);
    }
    commit_wgmma();
}

/// Waits for the current tile's values and returns where they lie.
template <int HEAD>
__device__ __forceinline__ uint32_t await_values(const Group<HEAD>& group) {
    using S = Shape<HEAD>;
    const uint32_t stage = group.count % S::STAGES;
    barrier_wait(group.shared + VALUES_FULL + stage * 8, group.count / S::STAGES % 2);
    return group.shared + S::VALUE_AT + stage * S::TILE_BYTES;
}

/// Clears the current tile's values from token `first` on: unwritten memory may hold what is no number, and 0 times
/// that is no number either. Both warpgroups take part.
template <int HEAD>
__device__ __forceinline__ void clear_tokens(const Group<HEAD>& group, uint32_t first) {
    using S = Shape<HEAD>;
    const uint32_t values = await_values<HEAD>(group), chunks = (S::KEYS - first) * 8;
    for (uint32_t at = group.index * 128 + group.thread; at < chunks * S::PARTS; at += 256)
        store16_shared(values + at / chunks * S::PART_BYTES + first * 128 + at % chunks * 16,
                       make_uint4(0, 0, 0, 0));
    fence_async_proxy();
    asm volatile("bar.sync 1, 256;" ::: "memory");
}

/// Starts `out += weights * V` for the current tile.
template <int HEAD>
__device__ __forceinline__ void start_values(Group<HEAD>& group, const uint32_t (&weights)[8][4]) {
    using S = Shape<HEAD>;
    const uint32_t values = await_values<HEAD>(group);
    fence_wgmma();
#pragma unroll
    for (uint32_t page = 0; page < S::PAGES; ++page)
        multiply_transposed(group.out, weights[page], operand(values + page * S::PAGE_PART_BYTES, S::PART_BYTES));
    commit_wgmma();
}

/// Gives a stage of the current tile back.
template <int HEAD>
__device__ __forceinline__ void give_back(const Group<HEAD>& group, uint32_t free_at, uint32_t count) {
    if (group.thread == 0) barrier_arrive(group.shared + free_at + count % Shape<HEAD>::STAGES * 8);
}

/// Softens the scores of `tile`.
template <int HEAD>
__device__ __forceinline__ void soften_tile(Group<HEAD>& group, const AttentionArguments& arguments,
                                            const Work& work, uint32_t tile, float (&factors)[2]) {
    const uint32_t key = tile * Shape<HEAD>::KEYS;
    if (key + Shape<HEAD>::KEYS > work.position_first + 1 || arguments.window != 0) {
        hide<16, 0>(group.s, key + group.thread % 4 * 2, group.rows.first[0], group.rows.end[0]);
        hide<16, 1>(group.s, key + group.thread % 4 * 2, group.rows.first[1], group.rows.end[1]);
    }
    factors[0] = soften<16, 0>(group.s, group.rows.split[0], arguments.scale_log2);
    factors[1] = soften<16, 1>(group.s, group.rows.split[1], arguments.scale_log2);
}

/// Weights as the A operand, from softened scores.
__device__ __forceinline__ void pack_weights(const float (&s)[16][4], uint32_t (&weights)[8][4]) {
#pragma unroll
    for (int page = 0; page < 8; ++page) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float(&from)[4] = s[2 * page + i / 2];
            weights[page][i] = pack_bf16(from[i % 2 * 2], from[i % 2 * 2 + 1]);
        }
    }
}

template <int HEAD>
__device__ __forceinline__ void rescale(float (&out)[HEAD / 8][4], const float (&factors)[2]) {
#pragma unroll
    for (int j = 0; j < HEAD / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[j][e] = __fmul_rn(out[j][e], factors[e / 2]);
    }
}

/// One unit: all tiles of keys for the warpgroup's 64 packed rows.
template <int HEAD>
__device__ __forceinline__ void walk_unit(Group<HEAD>& group, const AttentionArguments& arguments, const Work& work,
                                          float4* totals) {
    using S = Shape<HEAD>;
    const Range tiles = tiles_of<HEAD>(arguments, work);
    const uint32_t row = work.packed_first + group.index * 64 + group.thread / 32 * 16 + group.thread % 32 / 4;
    group.rows = begin_rows(arguments, work, row);
    clear<HEAD>(group.out);
    load_queries<HEAD>(group, arguments, work);
    bool first_split = true;
    float factors[2];
    uint32_t weights[8][4];
    start_scores<HEAD>(group, group.count);
    await_wgmma<0>();
    give_back<HEAD>(group, KEYS_FREE, group.count);
    soften_tile<HEAD>(group, arguments, work, tiles.first, factors);
    pack_weights(group.s, weights);
    for (uint32_t tile = tiles.first; tile < tiles.last; ++tile, ++group.count) {
        start_scores<HEAD>(group, group.count + 1);
        start_values<HEAD>(group, weights);
        await_wgmma<1>();
        give_back<HEAD>(group, KEYS_FREE, group.count + 1);
        const bool ends_split = (tile + 1) * S::KEYS % SPLIT_KEYS == 0;
        RowSum ended[2] = {group.rows.split[0], group.rows.split[1]};
        if (ends_split) group.rows.split[0] = group.rows.split[1] = empty_row();
        soften_tile<HEAD>(group, arguments, work, tile + 1, factors);
        await_wgmma<0>();
        give_back<HEAD>(group, VALUES_FREE, group.count);
        if (ends_split) {
            end_split<HEAD, 256>(group.out, ended, group.rows.total, totals, first_split, false);
            first_split = false;
        }
        rescale<HEAD>(group.out, factors);
        pack_weights(group.s, weights);
    }
    const uint32_t pages_end = (work.position_last / PAGE_TOKENS + 1) * PAGE_TOKENS;
    const uint32_t live = min(work.span.context, pages_end) - tiles.last * S::KEYS;
    if (live < S::KEYS) clear_tokens<HEAD>(group, live);
    start_values<HEAD>(group, weights);
    await_wgmma<0>();
    give_back<HEAD>(group, VALUES_FREE, group.count);
    ++group.count;
    end_split<HEAD, 256>(group.out, group.rows.split, group.rows.total, totals, first_split, true);
    store_output<HEAD, Kv::Bf16>(group.out, group.rows, arguments, work, row);
}

template <int HEAD>
__device__ __forceinline__ void prefill(const AttentionArguments& arguments) {
    using S = Shape<HEAD>;
    extern __shared__ unsigned char memory[];
    const uint32_t skew = (1024 - shared_address(memory) % 1024) % 1024;
    const uint32_t shared = shared_address(memory) + skew;
    release_successor();
    if (threadIdx.x == 0) {
        for (uint32_t stage = 0; stage < S::STAGES; ++stage) {
            barrier_init(shared + KEYS_FULL + stage * 8, 1);
            barrier_init(shared + VALUES_FULL + stage * 8, 1);
            barrier_init(shared + KEYS_FREE + stage * 8, 2);
            barrier_init(shared + VALUES_FREE + stage * 8, 2);
        }
        fence_async_proxy();
    }
    const uint32_t units = arguments.counts->prefill_tiles * arguments.kv_heads;
    __syncthreads();
    await_predecessor();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x < 32) produce<HEAD>(arguments, shared, units);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        Group<HEAD> group;
        group.shared = shared;
        group.index = threadIdx.x / 128 - 1;
        group.thread = threadIdx.x % 128;
        group.count = 0;
        float4* totals = reinterpret_cast<float4*>(memory + skew + S::TOTAL_AT) + threadIdx.x - 128;
        for (uint32_t round = 0, unit = unit_of(0); unit < units; unit = unit_of(++round)) {
            const Work work = find_work<HEAD>(arguments, arguments.prefill_tiles[unit / arguments.kv_heads],
                                              unit % arguments.kv_heads);
            walk_unit<HEAD>(group, arguments, work, totals);
        }
    }
}

}  // namespace
}  // namespace millrace

#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define MILLRACE_PREFILL_BODY(HEAD) millrace::prefill<HEAD>(arguments)
#else
#define MILLRACE_PREFILL_BODY(HEAD)
#endif

#define MILLRACE_PREFILL(HEAD)                                                                            \
    extern "C" __global__ void __launch_bounds__(millrace::PREFILL_WGMMA_THREADS, 1)                      \
        attention_prefill_wgmma_h##HEAD(const __grid_constant__ millrace::AttentionArguments arguments) { \
        MILLRACE_PREFILL_BODY(HEAD);                                                                      \
    }

MILLRACE_PREFILL(64)
MILLRACE_PREFILL(128)
