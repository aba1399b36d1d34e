// How the sums of a matrix product leave the block that made them.
//
// Tensor cores leave a warp 16 features, a thread features f and f + 8 of rows r and r + 1 in each tile of 8 rows of the
// batch. `pair_rows` trades them so that a thread has features f, f + 1, f + 8 and f + 9 of one row, which everything here
// works on: loads and stores are of pairs, and sums over features need few exchanges. A row that a norm precedes was
// multiplied without its factor: the product before left x * weight and sums of squares, and the factor, one for all of a
// row, is applied to the sums here. Everything that is added up over features (squares of rows and of heads) is added in
// an order that depends on the features alone: 4 in a thread, 16 in a warp, four warps, groups of 64 in ascending order.
// So a row has the same bytes from any kernel.
#pragma once

#include "cache.cuh"

/// How a tile of sums leaves.
enum Epilogue {
    /// out = sum + bias, f32.
    VALUES,
    /// out += sum + bias, f32, and what the next norm needs.
    ADD,
    /// Rows of the matrix alternate by 8: gate, up. out = silu(gate) * up, or GELU, bf16.
    SILU_MUL,
    /// Rows of the matrix alternate by 8: first and second half of a head. Norms and turns queries and keys; queries
    /// become operands, keys and values go into the cache.
    ROPE,
};

/// The norm before a product, if any: squares is null without one.
struct NormBefore {
    /// Sums of squares of a row's groups of 64 values.
    const float *squares;
    /// From row to row, a multiple of 4; what is beyond the groups is zero.
    int stride;
    float eps;
};

/// The norm after a product that adds, if any: weight is null without one.
struct NormAfter {
    const float *weight;
    /// Values times weight, bf16.
    __nv_bfloat16 *out;
    /// As `NormBefore` reads them.
    float *squares;
    int out_stride;
    int squares_stride;
};

/// What ROPE needs.
struct Heads {
    const Row *rows;
    /// Cosines, then sines, of each position.
    const float *table;
    /// Weights of the norms of heads, or null.
    const float *q_norm;
    const float *k_norm;
    __nv_bfloat16 *queries;
    void *cache;
    int heads;
    int kv_heads;
    int head_dim;
    int query_stride;
    float eps;
    /// One over the scales of a cache in 8 bits.
    float key_factor;
    float value_factor;
    int fp8;
};

/// Where blocks that share a tile meet: room for the sums of all that run at once, and counters that are zero between
/// kernels.
struct Meeting {
    float4 *sums;
    uint32_t *counters;
};

/// The result's side of a product.
struct Output {
    void *out;
    /// One per feature, in the order of the checkpoint, or null.
    const float *bias;
    /// Elements from one row of out to the next.
    int stride;
    /// Rows of the batch, features, columns of both operands.
    int rows;
    int features;
    int columns;
    /// Parts of K whose sums are added in order.
    int splits;
    /// Tiles of the batch.
    int batch_tiles;
    /// Tiles, or pairs of tiles, of features.
    int feature_tiles;
    /// Whether gates go through GELU; else through SiLU.
    int gelu;
    NormBefore before;
    NormAfter after;
    Heads heads;
    Meeting meeting;
};

/// Where a thread's part of a tile lies once rows are paired: features `feature`, `feature + 1`, `feature + 8` and
/// `feature + 9` of row `row` of the batch. `feature` is even, and the block's first row is `first_row`.
struct Spot {
    int feature;
    int row;
    int first_row;

    __device__ __forceinline__ Spot tile(int index) const { return {feature, row + 8 * index, first_row}; }
    __device__ __forceinline__ int local_row() const { return row - first_row; }

    /// The same place, of which the compiler knows nothing: it would keep the addresses of one loop for the next, and
    /// there are more of them than registers.
    __device__ __forceinline__ Spot anew() const {
        Spot spot = *this;
        asm volatile("" : "+r"(spot.feature), "+r"(spot.row)::"memory");
        return spot;
    }
};

/// This thread's spot in the block's first tile.
__device__ __forceinline__ Spot spot_in(int first_feature, int first_row) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return {first_feature + warp * 16 + lane / 8 * 2, first_row + lane % 4 * 2 + lane / 4 % 2, first_row};
}

/// What the threads of a block share while sums leave: factors and places of its rows, and partial sums of squares by
/// warp.
template <int WARPS_, int BATCH_>
struct Shared {
    static constexpr int WARPS = WARPS_, BATCH = BATCH_, THREADS = WARPS * 32, GROUPS = WARPS / 4;
    float factors[BATCH];
    uint32_t positions[BATCH];
    uint32_t slots[BATCH];
    float squares[WARPS][BATCH];
    float heads[GROUPS][BATCH];
};

/// What is needed from memory is loaded this many tiles at a time, so that the loads do not wait for each other's stores;
/// all at once would take too many registers.
constexpr int AHEAD = 8;
/// The same of cosines and sines.
constexpr int TURNS_AHEAD = 4;

/// Waits for the threads that hold sums.
template <int THREADS>
__device__ __forceinline__ void meet() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

/// Waits for the four warps that hold the sums of 64 features.
__device__ __forceinline__ void meet_group() {
    asm volatile("bar.sync %0, 128;" ::"r"(2 + threadIdx.x / 128) : "memory");
}

/// Fills in what is shared of the block's rows: the factors of the norm before, and with `PLACES` where the rows stand.
/// By `threads` threads, of which this is the one of that number; whoever needs it waits for them.
template <bool PLACES, class S>
__device__ __forceinline__ void load_rows(S &shared, const Output &output, int first_row, int thread, int threads) {
    for (int local = thread; local < S::BATCH; local += threads) {
        const int row = first_row + local;
        float factor = 1.0f;
        if (output.before.squares != nullptr && row < output.rows) {
            const auto *groups = reinterpret_cast<const float4 *>(output.before.squares + size_t(row) * output.before.stride);
            float sum = 0.0f;
#pragma unroll 4
            for (int i = 0; i < output.before.stride / 4; ++i) {
                const float4 v = groups[i];
                sum = (((sum + v.x) + v.y) + v.z) + v.w;
            }
            factor = 1.0f / sqrtf(sum / output.columns + output.before.eps);
        }
        shared.factors[local] = factor;
        if constexpr (PLACES) {
            const bool inside = row < output.rows;
            shared.positions[local] = inside ? output.heads.rows[row].position : 0;
            shared.slots[local] = inside ? output.heads.rows[row].slot : NO_SLOT;
        }
    }
}

/// Leaves a warp's sum of squares of a tile's row, of which four lanes hold a share each.
template <class S>
__device__ __forceinline__ void leave_squares(S &shared, Spot spot, const float (&values)[4]) {
    float squares = values[0] * values[0];
#pragma unroll
    for (int i = 1; i < 4; ++i) squares = __fmaf_rn(values[i], values[i], squares);
    squares += __shfl_xor_sync(0xffffffffu, squares, 8);
    squares += __shfl_xor_sync(0xffffffffu, squares, 16);
    if (threadIdx.x % 32 < 8) shared.squares[threadIdx.x / 32][spot.local_row()] = squares;
}

/// The sum of squares of the 64 features of a warpgroup.
template <class S>
__device__ __forceinline__ float group_squares(const S &shared, int group, int local) {
    const int warp = group * 4;
    return ((shared.squares[warp][local] + shared.squares[warp + 1][local]) + shared.squares[warp + 2][local]) +
           shared.squares[warp + 3][local];
}

/// Lanes 4 apart hold neighbouring features of two rows; afterwards one has both of the even row, the other both of the
/// odd one.
__device__ __forceinline__ float2 pair_up(float even_row, float odd_row) {
    const bool odd = threadIdx.x / 4 % 2 == 1;
    const float received = __shfl_xor_sync(0xffffffffu, odd ? even_row : odd_row, 4);
    return odd ? make_float2(received, odd_row) : make_float2(even_row, received);
}

/// Turns sums as tensor cores leave them into those of a `Spot`.
template <int COUNT>
__device__ __forceinline__ void pair_rows(float (&sums)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
        const float2 pair = pair_up(sums[i], sums[i + 1]);
        sums[i] = pair.x;
        sums[i + 1] = pair.y;
    }
}

/// Where a row begins: one multiplication of 32 bits by 32.
template <class T>
__device__ __forceinline__ T *row_of(T *first, int row, int stride) {
    const uint64_t bytes = uint64_t(uint32_t(row)) * uint32_t(stride * int(sizeof(T)));
    return reinterpret_cast<T *>(reinterpret_cast<uint64_t>(first) + bytes);
}

/// Feature `i` of the four of a spot that begins at `feature`.
__device__ __forceinline__ int feature_of(int feature, int i) { return feature + i / 2 * 8 + i % 2; }

/// A vector's numbers for the four features of a spot; zero where there is no vector or no such feature.
__device__ __forceinline__ void load_vector(const float *vector, const Output &output, int feature, float (&numbers)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const bool has = vector != nullptr && feature_of(feature, i) < output.features;
        numbers[i] = has ? __ldg(vector + feature_of(feature, i)) : 0.0f;
    }
}

/// Stores a spot's numbers, if they are inside of the result. Rows end at even features, be it in what pads them.
__device__ __forceinline__ void store_floats(const Output &output, Spot spot, const float (&values)[4]) {
    if (spot.row >= output.rows) return;
    float *out = row_of(static_cast<float *>(output.out) + spot.feature, spot.row, output.stride);
    if (spot.feature < output.features) *reinterpret_cast<float2 *>(out) = make_float2(values[0], values[1]);
    if (spot.feature + 8 < output.features) *reinterpret_cast<float2 *>(out + 8) = make_float2(values[2], values[3]);
}

// ---- VALUES and SILU_MUL ------------------------------------------------------------------------------------

template <class S, int TILES>
__device__ __forceinline__ void store_values(const S &shared, const Output &output, Spot first,
                                             const float (&sums)[TILES * 4]) {
    float bias[4];
    load_vector(output.bias, output, first.feature, bias);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const Spot spot = first.tile(tile);
        const float factor = shared.factors[spot.local_row()];
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = __fmaf_rn(sums[4 * tile + i], factor, bias[i]);
        store_floats(output, spot, values);
    }
}

template <class S, int TILES>
__device__ __forceinline__ void store_gated(const S &shared, const Output &output, Spot first,
                                            const float (&sums)[TILES * 4]) {
    const int target = first.feature / 16 * 8 + first.feature % 8;
    const bool inside = first.feature < output.features, gelu = output.gelu != 0;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const Spot spot = first.tile(tile);
        const float factor = shared.factors[spot.local_row()];
        const float *sum = &sums[4 * tile];
        const uint32_t pair = pack_bf16(gated(sum[0] * factor, gelu) * (sum[2] * factor),
                                        gated(sum[1] * factor, gelu) * (sum[3] * factor));
        auto *out = row_of(static_cast<__nv_bfloat16 *>(output.out) + target, spot.row, output.stride);
        if (spot.row < output.rows && inside) *reinterpret_cast<uint32_t *>(out) = pair;
    }
}

// ---- ADD ----------------------------------------------------------------------------------------------------

/// What stands at a spot before sums are added; zero outside of the result.
__device__ __forceinline__ void load_before(const Output &output, Spot spot, float (&before)[4]) {
    const float *out = row_of(static_cast<const float *>(output.out) + spot.feature, spot.row, output.stride);
    const bool inside = spot.row < output.rows;
    const float2 none = make_float2(0.0f, 0.0f);
    const float2 low = inside && spot.feature < output.features ? *reinterpret_cast<const float2 *>(out) : none;
    const float2 high = inside && spot.feature + 8 < output.features ? *reinterpret_cast<const float2 *>(out + 8) : none;
    before[0] = low.x, before[1] = low.y, before[2] = high.x, before[3] = high.y;
}

/// Leaves what the next norm needs of values that are final; those outside of the result are zero.
template <class S>
__device__ __forceinline__ void leave_normed(S &shared, const Output &output, Spot spot, const float (&values)[4],
                                             const float (&weight)[4]) {
    if (output.after.weight == nullptr) return;
    leave_squares(shared, spot, values);
    if (spot.row >= output.rows) return;
    __nv_bfloat16 *out = row_of(output.after.out + spot.feature, spot.row, output.after.out_stride);
    if (spot.feature < output.features)
        *reinterpret_cast<uint32_t *>(out) = pack_bf16(values[0] * weight[0], values[1] * weight[1]);
    if (spot.feature + 8 < output.features)
        *reinterpret_cast<uint32_t *>(out + 8) = pack_bf16(values[2] * weight[2], values[3] * weight[3]);
}

/// Writes the groups' sums of squares. `part` of `parts` says which tiles of 8 rows this block has made.
template <class S>
__device__ __forceinline__ void store_squares(const S &shared, const Output &output, int first_feature, int first_row,
                                              int part, int parts) {
    if (output.after.weight == nullptr) return;
    meet_group();
    const int group = threadIdx.x / 128, feature = first_feature + group * 64;
    if (feature >= output.features) return;
    for (int local = threadIdx.x % 128; local < S::BATCH; local += 128) {
        if (first_row + local >= output.rows || local / 8 % parts != part) continue;
        output.after.squares[size_t(first_row + local) * output.after.squares_stride + feature / 64] =
            group_squares(shared, group, local);
    }
}

/// Adds one tile of sums and the bias to what stood there, stores it, and leaves what the next norm needs.
template <class S>
__device__ __forceinline__ void finish_tile(S &shared, const Output &output, Spot spot, const float (&before)[4],
                                            const float (&sums)[4], const float (&bias)[4], const float (&weight)[4]) {
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = before[i] + sums[i] + bias[i];
    store_floats(output, spot, values);
    leave_normed(shared, output, spot, values, weight);
}

/// Adds a block's sums, those of all of K. What stands at the next tiles is on its way meanwhile.
template <class S, int TILES>
__device__ __forceinline__ void store_sums(S &shared, const Output &output, Spot start, const float (&sums)[TILES * 4],
                                           int block_feature) {
    constexpr int GROUPS = (TILES + AHEAD - 1) / AHEAD;
    float before[2][AHEAD][4], bias[4], weight[4];
    const auto load = [&](int group) {
        const Spot first = start.anew();
#pragma unroll
        for (int i = 0; i < AHEAD && group * AHEAD + i < TILES; ++i)
            load_before(output, first.tile(group * AHEAD + i), before[group % 2][i]);
    };
    load(0);
    load_vector(output.bias, output, start.feature, bias);
    load_vector(output.after.weight, output, start.feature, weight);
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        if (group + 1 < GROUPS) load(group + 1);
        const Spot first = start.anew();
#pragma unroll
        for (int i = 0; i < AHEAD && group * AHEAD + i < TILES; ++i) {
            const int tile = group * AHEAD + i;
            finish_tile(shared, output, first.tile(tile), before[group % 2][i],
                        {sums[4 * tile], sums[4 * tile + 1], sums[4 * tile + 2], sums[4 * tile + 3]}, bias, weight);
        }
    }
    store_squares(shared, output, block_feature, start.first_row, 0, 1);
}

// ---- ROPE ---------------------------------------------------------------------------------------------------

/// Where a row of a head of keys or values goes.
__device__ __forceinline__ PageTarget page_target(const Heads &heads, int head, uint32_t slot) {
    PageTarget page;
    page.cache = heads.cache;
    page.fp8 = heads.fp8 != 0;
    page.is_value = head >= heads.heads + heads.kv_heads;
    page.slot = slot;
    page.kv_head = head - heads.heads - (page.is_value ? heads.kv_heads : 0);
    page.kv_heads = heads.kv_heads;
    page.head_dim = heads.head_dim;
    page.factor = page.is_value ? heads.value_factor : heads.key_factor;
    return page;
}

/// The head that a thread's four features belong to: elements `element`, `element + 1`, and those half a head on.
struct HeadSpot {
    int head;
    int element;
    bool inside;
    bool is_query;
    bool is_value;
    /// The head's norm, or null.
    const float *norm;
};

__device__ __forceinline__ HeadSpot head_spot(const Output &output, int feature) {
    const Heads &heads = output.heads;
    const int dim = heads.head_dim, inside = feature % dim;
    HeadSpot spot;
    spot.head = feature / dim;
    spot.element = inside / 16 * 8 + inside % 8;
    spot.inside = feature < output.features;
    spot.is_query = spot.head < heads.heads;
    spot.is_value = spot.head >= heads.heads + heads.kv_heads;
    spot.norm = spot.is_value || !spot.inside ? nullptr : spot.is_query ? heads.q_norm : heads.k_norm;
    return spot;
}

/// A vector's numbers for the four elements of a spot.
__device__ __forceinline__ void load_elements(const float *vector, int element, int head_dim, float (&numbers)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) numbers[i] = __ldg(vector + element + i / 2 * (head_dim / 2) + i % 2);
}

/// Applies the factors of the norm before, and biases.
template <class S, int TILES>
__device__ __forceinline__ void finish_heads(const S &shared, const Output &output, HeadSpot at, Spot first,
                                             float (&sums)[TILES * 4]) {
    const int dim = output.heads.head_dim;
    float bias[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (output.bias != nullptr && at.inside) load_elements(output.bias + at.head * dim, at.element, dim, bias);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const float factor = shared.factors[first.tile(tile).local_row()];
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[4 * tile + i] = __fmaf_rn(sums[4 * tile + i], factor, bias[i]);
    }
}

/// Leaves each warp's share of the heads' sums of squares.
template <class S, int TILES>
__device__ __forceinline__ void leave_head_squares(S &shared, Spot first, const float (&sums)[TILES * 4]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const float *sum = &sums[4 * tile];
        leave_squares(shared, first.tile(tile), {sum[0], sum[1], sum[2], sum[3]});
    }
    meet<S::THREADS>();
}

/// Norms heads by the factors in `shared.heads`.
template <class S, int TILES>
__device__ __forceinline__ void norm_heads(const S &shared, const Output &output, HeadSpot at, Spot first,
                                           float (&sums)[TILES * 4]) {
    if (at.norm == nullptr) return;
    float weight[4];
    load_elements(at.norm, at.element, output.heads.head_dim, weight);
    const float *group = shared.heads[threadIdx.x / 128];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const float factor = group[first.tile(tile).local_row()];
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[4 * tile + i] = sums[4 * tile + i] * factor * weight[i];
    }
}

/// Turns queries and keys, and writes queries and the cache. Cosines and sines are loaded some tiles at a time, as the
/// values before an addition are.
template <class S, int TILES>
__device__ __forceinline__ void store_heads(const S &shared, const Output &output, HeadSpot at, Spot start,
                                            const float (&sums)[TILES * 4]) {
    constexpr int GROUP = TILES < TURNS_AHEAD ? TILES : TURNS_AHEAD;
    const Heads &heads = output.heads;
    const int half = heads.head_dim / 2;
    const float *table = heads.table + at.element;
#pragma unroll
    for (int ahead = 0; ahead < TILES; ahead += GROUP) {
        const Spot first = start.anew();
        float2 cosines[GROUP], sines[GROUP];
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const uint32_t position = shared.positions[first.tile(ahead + i).local_row()];
            const auto *turn = reinterpret_cast<const float2 *>(row_of(table, int(position), heads.head_dim));
            cosines[i] = at.is_value ? make_float2(1.0f, 1.0f) : __ldg(turn);
            sines[i] = at.is_value ? make_float2(0.0f, 0.0f) : __ldg(turn + half / 2);
        }
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const Spot spot = first.tile(ahead + i);
            const float *sum = &sums[4 * (ahead + i)];
            const float2 x = make_float2(sum[0], sum[1]), y = make_float2(sum[2], sum[3]);
            const float2 c = cosines[i], s = sines[i];
            float2 a = make_float2(__fmaf_rn(x.x, c.x, -(y.x * s.x)), __fmaf_rn(x.y, c.y, -(y.y * s.y)));
            float2 b = make_float2(__fmaf_rn(y.x, c.x, x.x * s.x), __fmaf_rn(y.y, c.y, x.y * s.y));
            // A value is not turned by nothing either: zero times infinity is no number.
            if (at.is_value) a = x, b = y;
            if (spot.row >= output.rows || !at.inside) continue;
            const uint32_t slot = shared.slots[spot.local_row()];
            if (at.is_query) {
                __nv_bfloat16 *first = heads.queries + at.head * heads.head_dim + at.element;
                __nv_bfloat16 *query = row_of(first, spot.row, heads.query_stride);
                *reinterpret_cast<uint32_t *>(query) = pack_bf16(a.x, a.y);
                *reinterpret_cast<uint32_t *>(query + half) = pack_bf16(b.x, b.y);
            } else if (slot != NO_SLOT) {
                const PageTarget page = page_target(heads, at.head, slot);
                write_pair(page, at.element, a.x, a.y);
                write_pair(page, at.element + half, b.x, b.y);
            }
        }
    }
}
