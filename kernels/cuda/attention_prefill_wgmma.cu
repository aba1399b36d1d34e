//! Paged attention for spans of any number of rows on sm_90a: wgmma, and warps that feed it.
//!
//! A CTA is persistent. Two producer warps copy keys and two copy values, page by page as they lie in the cache, into
//! three stages of keys and two of values; two warpgroups have 64 packed rows each, with their queries in registers. A
//! warpgroup asks for the scores of the next tile, be it of the next unit, then for the weighted values of this one,
//! and softens the former while the latter are computed. The two take turns in handing products to the tensor cores,
//! so that one's softmax runs beside the other's products (FlashAttention-3, Shah et al. 2024).
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
    /// Columns of 64 elements in a head, and the bytes of one of them of a whole tile of keys and of one page.
    static constexpr uint32_t PARTS = HEAD / 64;
    static constexpr uint32_t PART_BYTES = KEYS * 128;
    static constexpr uint32_t PAGE_PART_BYTES = PAGE_TOKENS * 128;
    static constexpr uint32_t TILE_BYTES = PARTS * PART_BYTES;
    static constexpr uint32_t KEY_STAGES = 3;
    static constexpr uint32_t VALUE_STAGES = 2;
    // Shared memory, in bytes from a multiple of 1024 on. Keys lie in columns of the whole tile, values in pages.
    static constexpr uint32_t KEY_AT = 1024;
    static constexpr uint32_t VALUE_AT = KEY_AT + KEY_STAGES * TILE_BYTES;
    static constexpr uint32_t TOTAL_AT = VALUE_AT + VALUE_STAGES * TILE_BYTES;
    static_assert(1024 + TOTAL_AT + 128 * HEAD * 4 == prefill_wgmma_shared_bytes(HEAD));
};

/// The barriers at the start of shared memory: 8 bytes each, one per stage, with room for four stages.
enum : uint32_t { KEYS_FULL = 0, KEYS_FREE = 32, VALUES_FULL = 64, VALUES_FREE = 96 };

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

/// `d = a * b` or `d += a * b`: 64 rows, 128 columns, 16 deep, `a` in registers.
__device__ __forceinline__ void multiply(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b, bool add) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"
        : MILLRACE_D16(d, 0), MILLRACE_D16(d, 4), MILLRACE_D16(d, 8), MILLRACE_D16(d, 12)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)));
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


/// The units of a launch that this CTA has still to do. A unit is a tile of the plan and a key-value head. The heads
/// are cut into sections, as small as leaves each CTA three units of a section, so that the keys and values in use at
/// one time stay in the L2 cache. Sections run from short units to long ones and back, the last from long to short,
/// and CTAs are dealt units forth and back, which spreads long and short ones evenly.
struct Units {
    uint32_t section_heads;
    uint32_t section_units;
    uint32_t all;
    uint32_t round;

    __device__ __forceinline__ explicit Units(const AttentionArguments& arguments) {
        const uint32_t tiles = arguments.counts->prefill_tiles;
        section_heads = arguments.kv_heads;
        while (section_heads % 2 == 0 && tiles * (section_heads / 2) >= 3 * gridDim.x) section_heads /= 2;
        section_units = tiles * section_heads;
        all = tiles * arguments.kv_heads;
        round = 0;
    }
    __device__ __forceinline__ uint32_t next() const {
        return round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
    }
    __device__ __forceinline__ bool any() const { return next() < all; }
    /// The next unit; `any` says that there is one.
    template <int HEAD>
    __device__ __forceinline__ Work look(const AttentionArguments& arguments) const {
        const uint32_t section = next() / section_units;
        uint32_t place = next() % section_units;
        if ((all / section_units - section) % 2 == 0) place = section_units - 1 - place;
        return find_work<prefill_tile_rows(HEAD)>(arguments, arguments.prefill_tiles[place / section_heads],
                                                  section * section_heads + place % section_heads);
    }
};

/// A tile of keys of a unit, and the unit's last one.
struct Step {
    Work work;
    uint32_t tile;
    uint32_t last;
    __device__ __forceinline__ bool ends_unit() const { return tile == last; }
};

template <int HEAD>
__device__ __forceinline__ Step first_step(const AttentionArguments& arguments, const Work& work) {
    return {work, window_first(work.position_first, arguments.window) / Shape<HEAD>::KEYS,
            work.position_last / Shape<HEAD>::KEYS};
}

/// Where in a ring of stages someone is.
template <uint32_t STAGES>
struct Place {
    uint32_t stage;
    uint32_t parity;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

/// One of two producer warps of the keys, or of the values: half of the pages of each tile of all units, in order. A
/// lane copies a page of values, or a column of 64 elements of a page of keys.
template <int HEAD, bool VALUES>
__device__ __forceinline__ void produce(const AttentionArguments& arguments, uint32_t shared, uint32_t half) {
    using S = Shape<HEAD>;
    constexpr uint32_t PIECES = VALUES ? 1 : S::PARTS, PIECE_BYTES = S::PAGE_BYTES / PIECES;
    constexpr uint32_t TILE_AT = VALUES ? S::VALUE_AT : S::KEY_AT;
    constexpr uint32_t FULL = VALUES ? VALUES_FULL : KEYS_FULL, FREE = VALUES ? VALUES_FREE : KEYS_FREE;
    const uint32_t lane = threadIdx.x % 32, page_of_lane = half * (S::PAGES / 2) + lane / PIECES;
    const uint32_t to = TILE_AT + (VALUES ? page_of_lane * S::PAGE_BYTES
                                          : lane % PIECES * S::PART_BYTES + page_of_lane * S::PAGE_PART_BYTES);
    const uint32_t block_bytes = 2 * arguments.kv_heads * S::PAGE_BYTES;
    Place<VALUES ? S::VALUE_STAGES : S::KEY_STAGES> place = {0, 1};
    for (Units units(arguments); units.any(); ++units.round) {
        const Step first = first_step<HEAD>(arguments, units.look<HEAD>(arguments));
        const uint32_t* table = arguments.tables + first.work.span.table;
        const char* pages = static_cast<const char*>(arguments.cache) +
                            uint64_t((VALUES ? arguments.kv_heads : 0) + first.work.kv_head) * S::PAGE_BYTES +
                            lane % PIECES * PIECE_BYTES;
        const uint32_t page_end = first.work.position_last / PAGE_TOKENS + 1;
#pragma unroll 1
        for (uint32_t tile = first.tile; tile <= first.last; ++tile, place.advance()) {
            const uint32_t page = tile * S::PAGES + half * (S::PAGES / 2);
            const uint32_t live = page < page_end ? min(page_end - page, S::PAGES / 2) : 0;
            const char* from = pages;
            if (lane < live * PIECES) from += uint64_t(table[page + lane / PIECES]) * block_bytes;
            barrier_wait(shared + FREE + place.stage * 8, place.parity);
            const uint32_t full = shared + FULL + place.stage * 8;
            if (lane == 0) barrier_expect(full, live * S::PAGE_BYTES);
            __syncwarp();
            if (lane < live * PIECES) copy_bulk(shared + to + place.stage * S::TILE_BYTES, from, PIECE_BYTES, full);
        }
    }
}

/// A warpgroup's state.
template <int HEAD>
struct Group {
    /// Scores, and weights from `soften_tile` on, of the tile ahead.
    float s[16][4];
    float out[HEAD / 8][4];
    /// Weights of the current tile, as the A operand.
    uint32_t weights[8][4];
    /// Queries of the unit ahead, as the A operand.
    uint32_t queries[HEAD / 16][4];
    RowPair rows;
    /// Where this thread's share of the splits before lies, and whether there is none.
    float4* totals;
    bool first_split;
    uint32_t shared;
    /// 0 or 1, and the thread in it.
    uint32_t index;
    uint32_t thread;
    /// The next tile of keys, and of values.
    Place<Shape<HEAD>::KEY_STAGES> keys;
    Place<Shape<HEAD>::VALUE_STAGES> values;
};

/// The first packed row of this thread.
template <int HEAD>
__device__ __forceinline__ uint32_t packed_row(const Group<HEAD>& group, const Work& work) {
    return work.packed_first + group.index * 64 + group.thread / 32 * 16 + group.thread % 32 / 4;
}

/// Loads the queries of this thread's rows; a row beyond the last has those of the last.
template <int HEAD>
__device__ __forceinline__ void load_queries(Group<HEAD>& group, const AttentionArguments& arguments,
                                             const Work& work) {
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t packed = min(packed_row(group, work) + half * 8, work.packed_rows - 1);
        const uint32_t* from = reinterpret_cast<const uint32_t*>(
            arguments.queries + row_place<HEAD>(arguments, work, packed, arguments.query_stride) +
            group.thread % 4 * 2);
#pragma unroll
        for (uint32_t step = 0; step < HEAD / 16; ++step) {
            group.queries[step][half] = from[step * 8];
            group.queries[step][2 + half] = from[step * 8 + 4];
        }
    }
}

/// Waits until it is this warpgroup's turn to hand products to the tensor cores.
template <int HEAD>
__device__ __forceinline__ void await_turn(const Group<HEAD>& group) {
    if (group.index == 0) asm volatile("bar.sync 2, 256;" ::: "memory");
    else asm volatile("bar.sync 3, 256;" ::: "memory");
}

/// Gives the turn to the other warpgroup.
template <int HEAD>
__device__ __forceinline__ void pass_turn(const Group<HEAD>& group) {
    if (group.index == 0) asm volatile("bar.arrive 3, 256;" ::: "memory");
    else asm volatile("bar.arrive 2, 256;" ::: "memory");
}

template <int HEAD>
__device__ __forceinline__ void await_keys(const Group<HEAD>& group) {
    barrier_wait(group.shared + KEYS_FULL + group.keys.stage * 8, group.keys.parity);
}

template <int HEAD>
__device__ __forceinline__ void await_values(const Group<HEAD>& group) {
    barrier_wait(group.shared + VALUES_FULL + group.values.stage * 8, group.values.parity);
}

/// Starts `s = q * K^T` for the next tile of keys.
template <int HEAD>
__device__ __forceinline__ void start_scores(Group<HEAD>& group) {
    using S = Shape<HEAD>;
    const uint32_t keys = group.shared + S::KEY_AT + group.keys.stage * S::TILE_BYTES;
    fence_wgmma();
#pragma unroll
    for (uint32_t step = 0; step < HEAD / 16; ++step)
        multiply(group.s, group.queries[step], operand(keys + step / 4 * S::PART_BYTES + step % 4 * 32, 16), step != 0);
    commit_wgmma();
}

/// Starts `out += weights * V` for the next tile of values.
template <int HEAD>
__device__ __forceinline__ void start_values(Group<HEAD>& group) {
    using S = Shape<HEAD>;
    const uint32_t values = group.shared + S::VALUE_AT + group.values.stage * S::TILE_BYTES;
    fence_wgmma();
#pragma unroll
    for (uint32_t page = 0; page < S::PAGES; ++page)
        multiply_transposed(group.out, group.weights[page],
                            operand(values + page * S::PAGE_BYTES, S::PAGE_PART_BYTES));
    commit_wgmma();
}

/// Gives the stage of the next tile of keys back, whose scores are there.
template <int HEAD>
__device__ __forceinline__ void free_keys(Group<HEAD>& group) {
    if (group.thread == 0) barrier_arrive(group.shared + KEYS_FREE + group.keys.stage * 8);
    group.keys.advance();
}

template <int HEAD>
__device__ __forceinline__ void free_values(Group<HEAD>& group) {
    if (group.thread == 0) barrier_arrive(group.shared + VALUES_FREE + group.values.stage * 8);
    group.values.advance();
}

/// Clears, in the last tile of values of a unit, the tokens that are not there: unwritten memory may hold what is no
/// number, and 0 times that is no number either. Each warpgroup clears all of them, for neither waits for the other.
template <int HEAD>
__device__ __forceinline__ void clear_tail(const Group<HEAD>& group, const Step& step) {
    using S = Shape<HEAD>;
    const uint32_t pages_end = (step.work.position_last / PAGE_TOKENS + 1) * PAGE_TOKENS;
    const uint32_t live = min(step.work.span.context, pages_end) - step.tile * S::KEYS;
    if (live >= S::KEYS) return;
    await_values(group);
    const uint32_t values = group.shared + S::VALUE_AT + group.values.stage * S::TILE_BYTES;
    // A token has 8 chunks of 16 bytes in each column of 64 elements.
    for (uint32_t at = live * 8 * S::PARTS + group.thread; at < S::KEYS * 8 * S::PARTS; at += 128) {
        const uint32_t token = at / (8 * S::PARTS), part = at / 8 % S::PARTS;
        store16_shared(values + token / PAGE_TOKENS * S::PAGE_BYTES + part * S::PAGE_PART_BYTES +
                           token % PAGE_TOKENS * 128 + at % 8 * 16,
                       make_uint4(0, 0, 0, 0));
    }
    fence_async_proxy();
    if (group.index == 0) asm volatile("bar.sync 4, 128;" ::: "memory");
    else asm volatile("bar.sync 5, 128;" ::: "memory");
}

/// Softens the scores of a tile.
template <int HEAD>
__device__ __forceinline__ void soften_tile(Group<HEAD>& group, const AttentionArguments& arguments,
                                            const Step& step, float (&factors)[2]) {
    const uint32_t key = step.tile * Shape<HEAD>::KEYS;
    if (key + Shape<HEAD>::KEYS > step.work.position_first + 1 || arguments.window != 0) {
        hide<16, 0>(group.s, key + group.thread % 4 * 2, group.rows.first[0], group.rows.end[0]);
        hide<16, 1>(group.s, key + group.thread % 4 * 2, group.rows.first[1], group.rows.end[1]);
    }
    factors[0] = soften<16, 0>(group.s, group.rows.split[0], arguments.scale_log2);
    factors[1] = soften<16, 1>(group.s, group.rows.split[1], arguments.scale_log2);
}

/// Makes the tile ahead the current one.
template <int HEAD>
__device__ __forceinline__ void pack_weights(Group<HEAD>& group) {
#pragma unroll
    for (int page = 0; page < 8; ++page) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float(&from)[4] = group.s[2 * page + i / 2];
            group.weights[page][i] = pack_bf16(from[i % 2 * 2], from[i % 2 * 2 + 1]);
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

/// Loads the queries of the next unit, once the scores of a unit's last tile are there.
template <int HEAD>
__device__ __forceinline__ void turn_queries(Group<HEAD>& group, const AttentionArguments& arguments,
                                             const Units& units, const Step& step) {
    if (step.ends_unit() && units.any()) load_queries(group, arguments, units.look<HEAD>(arguments));
}

/// Weighted values of the tile `at`, and beside them scores and weights of the tile `ahead`.
template <int HEAD>
__device__ __forceinline__ void advance(Group<HEAD>& group, const AttentionArguments& arguments, const Units& units,
                                        const Step& at, const Step& ahead) {
    if (at.ends_unit()) clear_tail(group, at);
    await_turn(group);
    start_scores(group);
    await_values(group);
    start_values(group);
    pass_turn(group);
    await_wgmma<1>();
    free_keys(group);
    turn_queries(group, arguments, units, ahead);
    const bool ends_split = at.ends_unit() || ahead.tile * Shape<HEAD>::KEYS % SPLIT_KEYS == 0;
    RowSum ended[2] = {group.rows.split[0], group.rows.split[1]};
    if (ends_split) group.rows.split[0] = group.rows.split[1] = empty_row();
    if (at.ends_unit()) see_keys(group.rows, arguments, ahead.work, packed_row(group, ahead.work));
    float factors[2];
    soften_tile(group, arguments, ahead, factors);
    // Waited for here, so that the compiler leaves the wait for the products below the softmax, on which the branch
    // depends for that reason alone: no sum of weights is negative.
    const bool negative = group.rows.split[0].sum < 0.f || group.rows.split[1].sum < 0.f;
    if (!ahead.ends_unit() || units.any() || __any_sync(0xffffffffu, negative)) await_keys(group);
    await_wgmma<0>();
    free_values(group);
    if (ends_split) {
        end_split<HEAD, 256>(group.out, ended, group.rows.total, group.totals, group.first_split, at.ends_unit());
        group.first_split = at.ends_unit();
        if (at.ends_unit()) {
            store_output<HEAD, Kv::Bf16>(group.out, group.rows, arguments, at.work, packed_row(group, at.work));
            clear<HEAD>(group.out);
        }
    } else {
        rescale<HEAD>(group.out, factors);
    }
    pack_weights(group);
}

/// A warpgroup: all tiles of all units of the CTA, one after the other.
template <int HEAD>
__device__ __forceinline__ void consume(Group<HEAD>& group, const AttentionArguments& arguments) {
    Units units(arguments);
    if (!units.any()) return;
    Step at = first_step<HEAD>(arguments, units.look<HEAD>(arguments));
    ++units.round;
    load_queries(group, arguments, at.work);
    group.rows = begin_rows(arguments, at.work, packed_row(group, at.work));
    clear<HEAD>(group.out);
    if (group.index == 1) pass_turn(group);
    await_keys(group);
    await_turn(group);
    start_scores(group);
    pass_turn(group);
    await_wgmma<0>();
    free_keys(group);
    turn_queries(group, arguments, units, at);
    float factors[2];
    soften_tile(group, arguments, at, factors);
    if (!at.ends_unit() || units.any()) await_keys(group);
    pack_weights(group);
    while (!at.ends_unit() || units.any()) {
        Step ahead = at;
        ++ahead.tile;
        if (at.ends_unit()) {
            ahead = first_step<HEAD>(arguments, units.look<HEAD>(arguments));
            ++units.round;
        }
        advance(group, arguments, units, at, ahead);
        at = ahead;
    }
    clear_tail(group, at);
    await_values(group);
    await_turn(group);
    start_values(group);
    pass_turn(group);
    await_wgmma<0>();
    end_split<HEAD, 256>(group.out, group.rows.split, group.rows.total, group.totals, group.first_split, true);
    store_output<HEAD, Kv::Bf16>(group.out, group.rows, arguments, at.work, packed_row(group, at.work));
}

template <int HEAD>
__device__ __forceinline__ void prefill(const AttentionArguments& arguments) {
    using S = Shape<HEAD>;
    extern __shared__ unsigned char memory[];
    const uint32_t skew = (1024 - shared_address(memory) % 1024) % 1024;
    const uint32_t shared = shared_address(memory) + skew;
    release_successor();
    if (threadIdx.x == 0) {
        // Two warps fill a stage, two warpgroups free it.
        for (uint32_t barrier = KEYS_FULL; barrier < VALUES_FREE + 32; barrier += 8) barrier_init(shared + barrier, 2);
        fence_async_proxy();
    }
    __syncthreads();
    await_predecessor();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        const uint32_t warp = threadIdx.x / 32;
        if (warp < 2) produce<HEAD, false>(arguments, shared, warp);
        else produce<HEAD, true>(arguments, shared, warp - 2);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        Group<HEAD> group;
        group.totals = reinterpret_cast<float4*>(memory + skew + S::TOTAL_AT) + threadIdx.x - 128;
        group.first_split = true;
        group.shared = shared;
        group.index = __shfl_sync(0xffffffffu, threadIdx.x / 128 - 1, 0);
        group.thread = threadIdx.x % 128;
        group.keys = {0, 0};
        group.values = {0, 0};
        consume(group, arguments);
    }
}

}  // namespace
}  // namespace millrace

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
