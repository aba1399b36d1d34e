// How the sums of a matrix product leave the block that made them.
//
// Sums lie as tensor cores leave them: a warp has 16 features, a thread features f and f + 8 of rows r and r + 1 in each
// tile of 8 rows of the batch. A row that a norm precedes was multiplied without its factor: the product before left
// x * weight and sums of squares, and the factor, one for all of a row, is applied to the sums here. Everything that is
// added up over features (squares of rows and of heads) is added in an order that depends on the features alone: 16 in a
// warp, four warps, groups of 64 in ascending order. So a row has the same bytes from any kernel.
#pragma once

#include "cache.cuh"

/// How a tile of sums leaves.
enum Epilogue {
    /// out = sum + bias, f32.
    VALUES,
    /// out += sum + bias, f32, and what the next norm needs.
    ADD,
    /// Rows of the matrix alternate by 8: gate, up. out = silu(gate) * up, bf16.
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
    NormBefore before;
    NormAfter after;
    Heads heads;
};

/// Where a thread's part of a tile lies: features `feature` and `feature + 8`, rows `row` and `row + 1` of the batch, of
/// which the block's first is `first_row`.
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

/// What the threads of a block share while sums leave: factors and places of its rows, and partial sums of squares by
/// warp. `AHEAD_` is for how many tiles the cosines and sines are loaded at once: as many as there are registers for.
template <int WARPS_, int BATCH_, int AHEAD_ = 4>
struct Shared {
    static constexpr int TURNS_AHEAD = AHEAD_;
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

/// Waits for the threads that hold sums.
template <int THREADS>
__device__ __forceinline__ void meet() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
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

/// Adds over the 8 lanes that hold the same rows: 16 features of a warp.
__device__ __forceinline__ float warp_features_sum(float value) {
    value += __shfl_xor_sync(0xffffffffu, value, 4);
    value += __shfl_xor_sync(0xffffffffu, value, 8);
    return value + __shfl_xor_sync(0xffffffffu, value, 16);
}

/// Leaves a warp's sums of squares of a tile's rows.
template <class S>
__device__ __forceinline__ void leave_squares(S &shared, Spot spot, float even, float odd) {
    even = warp_features_sum(even);
    odd = warp_features_sum(odd);
    if (threadIdx.x % 32 < 4) {
        float *squares = shared.squares[threadIdx.x / 32] + spot.local_row();
        squares[0] = even;
        squares[1] = odd;
    }
}

/// The sum of squares of the 64 features of a warpgroup.
template <class S>
__device__ __forceinline__ float group_squares(const S &shared, int group, int local) {
    const int warp = group * 4;
    return ((shared.squares[warp][local] + shared.squares[warp + 1][local]) + shared.squares[warp + 2][local]) +
           shared.squares[warp + 3][local];
}

__device__ __forceinline__ bool holds_odd_row() { return threadIdx.x / 4 % 2 == 1; }

/// Lanes 4 apart hold neighbouring features of two rows; afterwards one has both of the even row, the other both of the
/// odd one.
__device__ __forceinline__ float2 pair_up(float even_row, float odd_row) {
    const bool odd = holds_odd_row();
    const float received = __shfl_xor_sync(0xffffffffu, odd ? even_row : odd_row, 4);
    return odd ? make_float2(received, odd_row) : make_float2(even_row, received);
}

__device__ __forceinline__ void load_bias(const Output &output, int feature, float (&bias)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool has = output.bias != nullptr && feature + 8 * half < output.features;
        bias[half] = has ? __ldg(output.bias + feature + 8 * half) : 0.0f;
    }
}

/// Calls `run(i, feature, row)` for the four sums of a spot that are inside of the result.
template <class F>
__device__ __forceinline__ void each_inside(const Output &output, Spot spot, F run) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int feature = spot.feature + i / 2 * 8, row = spot.row + i % 2;
        if (feature < output.features && row < output.rows) run(i, feature, row);
    }
}

// ---- VALUES and SILU_MUL ------------------------------------------------------------------------------------

template <class S, int TILES>
__device__ __forceinline__ void store_values(const S &shared, const Output &output, Spot first,
                                             const float (&sums)[TILES * 4]) {
    float bias[2];
    load_bias(output, first.feature, bias);
    float *out = static_cast<float *>(output.out);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const Spot spot = first.tile(tile);
        const float *factors = shared.factors + spot.local_row();
        each_inside(output, spot, [&](int i, int feature, int row) {
            out[size_t(row) * output.stride + feature] = __fmaf_rn(sums[4 * tile + i], factors[i % 2], bias[i / 2]);
        });
    }
}

template <class S, int TILES>
__device__ __forceinline__ void store_gated(const S &shared, const Output &output, Spot first,
                                            const float (&sums)[TILES * 4]) {
    const int target = first.feature / 16 * 8 + (first.feature % 8) / 2 * 2;
    const bool inside = first.feature < output.features;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const Spot spot = first.tile(tile);
        const float *factors = shared.factors + spot.local_row();
        const float *sum = &sums[4 * tile];
        const float2 pair = pair_up(silu(sum[0] * factors[0]) * (sum[2] * factors[0]),
                                    silu(sum[1] * factors[1]) * (sum[3] * factors[1]));
        const int row = spot.row + (holds_odd_row() ? 1 : 0);
        if (row < output.rows && inside) {
            auto *out = static_cast<__nv_bfloat16 *>(output.out) + size_t(row) * output.stride + target;
            *reinterpret_cast<uint32_t *>(out) = pack_bf16(pair.x, pair.y);
        }
    }
}

// ---- ADD ----------------------------------------------------------------------------------------------------

/// What stands at a spot before sums are added; zero outside of the result.
__device__ __forceinline__ void load_before(const Output &output, Spot spot, float (&before)[4]) {
    const float *out = static_cast<const float *>(output.out);
#pragma unroll
    for (float &value : before) value = 0.0f;
    each_inside(output, spot,
                [&](int i, int feature, int row) { before[i] = out[size_t(row) * output.stride + feature]; });
}

__device__ __forceinline__ void store_added(const Output &output, Spot spot, const float (&values)[4]) {
    float *out = static_cast<float *>(output.out);
    each_inside(output, spot,
                [&](int i, int feature, int row) { out[size_t(row) * output.stride + feature] = values[i]; });
}

/// The norm's weights of a thread's two features.
__device__ __forceinline__ void load_norm(const Output &output, int feature, float (&weight)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool has = output.after.weight != nullptr && feature + 8 * half < output.features;
        weight[half] = has ? __ldg(output.after.weight + feature + 8 * half) : 0.0f;
    }
}

/// Leaves what the next norm needs of values that are final; those outside of the result are zero.
template <class S>
__device__ __forceinline__ void leave_normed(S &shared, const Output &output, Spot spot, const float (&values)[4],
                                             const float (&weight)[2]) {
    if (output.after.weight == nullptr) return;
    leave_squares(shared, spot, __fmaf_rn(values[0], values[0], values[2] * values[2]),
                  __fmaf_rn(values[1], values[1], values[3] * values[3]));
    const float2 low = pair_up(values[0] * weight[0], values[1] * weight[0]);
    const float2 high = pair_up(values[2] * weight[1], values[3] * weight[1]);
    const int row = spot.row + (holds_odd_row() ? 1 : 0), feature = spot.feature - (holds_odd_row() ? 1 : 0);
    if (row >= output.rows) return;
    __nv_bfloat16 *out = output.after.out + size_t(row) * output.after.out_stride;
    if (feature < output.features) *reinterpret_cast<uint32_t *>(out + feature) = pack_bf16(low.x, low.y);
    if (feature + 8 < output.features) *reinterpret_cast<uint32_t *>(out + feature + 8) = pack_bf16(high.x, high.y);
}

/// Writes the groups' sums of squares. `part` of `parts` says which tiles of 8 rows this block has made.
template <class S>
__device__ __forceinline__ void store_squares(const S &shared, const Output &output, int first_feature, int first_row,
                                              int part, int parts) {
    if (output.after.weight == nullptr) return;
    meet<S::THREADS>();
    for (int i = threadIdx.x; i < S::GROUPS * S::BATCH; i += S::THREADS) {
        const int group = i / S::BATCH, local = i % S::BATCH, feature = first_feature + group * 64;
        if (first_row + local >= output.rows || feature >= output.features || local / 8 % parts != part) continue;
        output.after.squares[size_t(first_row + local) * output.after.squares_stride + feature / 64] =
            group_squares(shared, group, local);
    }
}

/// Adds what is there to sums.
template <int TILES>
__device__ __forceinline__ void add_before(const Output &output, Spot first, float (&sums)[TILES * 4]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        float before[4];
        load_before(output, first.anew().tile(tile), before);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[4 * tile + i] = before[i] + sums[4 * tile + i];
    }
}

/// Adds the bias to one tile of sums, stores it, and leaves what the next norm needs.
template <class S>
__device__ __forceinline__ void finish_tile(S &shared, const Output &output, Spot spot, const float *sums,
                                            const float (&bias)[2], const float (&weight)[2]) {
    const float values[4] = {sums[0] + bias[0], sums[1] + bias[0], sums[2] + bias[1], sums[3] + bias[1]};
    store_added(output, spot, values);
    leave_normed(shared, output, spot, values, weight);
}

/// Stores a block's sums, with what is there added to them if it is not yet.
template <bool ADDED, class S, int TILES>
__device__ __forceinline__ void store_sums(S &shared, const Output &output, Spot start, const float (&sums)[TILES * 4],
                                           int block_feature) {
    float bias[2], weight[2];
    load_bias(output, start.feature, bias);
    load_norm(output, start.feature, weight);
#pragma unroll
    for (int ahead = 0; ahead < TILES; ahead += AHEAD) {
        const Spot first = start.anew();
        float values[AHEAD][4];
#pragma unroll
        for (int i = 0; i < AHEAD && ahead + i < TILES; ++i) {
            if constexpr (!ADDED) load_before(output, first.tile(ahead + i), values[i]);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                values[i][j] = ADDED ? sums[4 * (ahead + i) + j] : values[i][j] + sums[4 * (ahead + i) + j];
        }
#pragma unroll
        for (int i = 0; i < AHEAD && ahead + i < TILES; ++i)
            finish_tile(shared, output, first.tile(ahead + i), values[i], bias, weight);
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

/// The head that a thread's two features belong to: elements `element` and `element + head_dim / 2`.
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

/// Applies the factors of the norm before, and biases.
template <class S, int TILES>
__device__ __forceinline__ void finish_heads(const S &shared, const Output &output, HeadSpot at, Spot first,
                                             float (&sums)[TILES * 4]) {
    const int dim = output.heads.head_dim;
    const bool has = output.bias != nullptr && at.inside;
    const float *source = output.bias + at.head * dim + at.element;
    const float bias[2] = {has ? __ldg(source) : 0.0f, has ? __ldg(source + dim / 2) : 0.0f};
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const float *factors = shared.factors + first.tile(tile).local_row();
#pragma unroll
        for (int i = 0; i < 4; ++i)
            sums[4 * tile + i] = __fmaf_rn(sums[4 * tile + i], factors[i % 2], bias[i / 2]);
    }
}

/// Leaves each warp's share of the heads' sums of squares.
template <class S, int TILES>
__device__ __forceinline__ void leave_head_squares(S &shared, Spot first, const float (&sums)[TILES * 4]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const float *sum = &sums[4 * tile];
        leave_squares(shared, first.tile(tile), __fmaf_rn(sum[0], sum[0], sum[2] * sum[2]),
                      __fmaf_rn(sum[1], sum[1], sum[3] * sum[3]));
    }
    meet<S::THREADS>();
}

/// Norms heads by the factors in `shared.heads`.
template <class S, int TILES>
__device__ __forceinline__ void norm_heads(const S &shared, const Output &output, HeadSpot at, Spot first,
                                           float (&sums)[TILES * 4]) {
    if (at.norm == nullptr) return;
    const float weight[2] = {__ldg(at.norm + at.element), __ldg(at.norm + at.element + output.heads.head_dim / 2)};
    const float *group = shared.heads[threadIdx.x / 128];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        const float *factors = group + first.tile(tile).local_row();
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[4 * tile + i] = sums[4 * tile + i] * factors[i % 2] * weight[i / 2];
    }
}

/// Turns queries and keys, and writes queries and the cache. Cosines and sines are loaded some tiles at a time, as the
/// values before an addition are.
template <class S, int TILES>
__device__ __forceinline__ void store_heads(const S &shared, const Output &output, HeadSpot at, Spot start,
                                            const float (&sums)[TILES * 4]) {
    constexpr int GROUP = TILES < S::TURNS_AHEAD ? TILES : S::TURNS_AHEAD;
    const Heads &heads = output.heads;
    const int odd = holds_odd_row() ? 1 : 0, half = heads.head_dim / 2, element = at.element - odd;
    const float *table = heads.table + element;
#pragma unroll
    for (int ahead = 0; ahead < TILES; ahead += GROUP) {
        const Spot first = start.anew();
        float2 cosines[GROUP], sines[GROUP];
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const int local = first.tile(ahead + i).local_row() + odd;
            const auto *turn = reinterpret_cast<const float2 *>(table + size_t(shared.positions[local]) * heads.head_dim);
            cosines[i] = at.is_value ? make_float2(1.0f, 1.0f) : __ldg(turn);
            sines[i] = at.is_value ? make_float2(0.0f, 0.0f) : __ldg(turn + half / 2);
        }
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const float *sum = &sums[4 * (ahead + i)];
            const float2 x = pair_up(sum[0], sum[1]), y = pair_up(sum[2], sum[3]);
            const float2 c = cosines[i], s = sines[i];
            float2 a = make_float2(__fmaf_rn(x.x, c.x, -(y.x * s.x)), __fmaf_rn(x.y, c.y, -(y.y * s.y)));
            float2 b = make_float2(__fmaf_rn(y.x, c.x, x.x * s.x), __fmaf_rn(y.y, c.y, x.y * s.y));
            // A value is not turned by nothing either: zero times infinity is no number.
            if (at.is_value) a = x, b = y;
            const int row = first.row + 8 * (ahead + i) + odd;
            if (row >= output.rows || !at.inside) continue;
            const uint32_t slot = shared.slots[first.tile(ahead + i).local_row() + odd];
            if (at.is_query) {
                __nv_bfloat16 *query = heads.queries + size_t(row) * heads.query_stride + at.head * heads.head_dim + element;
                *reinterpret_cast<uint32_t *>(query) = pack_bf16(a.x, a.y);
                *reinterpret_cast<uint32_t *>(query + half) = pack_bf16(b.x, b.y);
            } else if (slot != NO_SLOT) {
                const PageTarget page = page_target(heads, at.head, slot);
                write_pair(page, element, a.x, a.y);
                write_pair(page, element + half, b.x, b.y);
            }
        }
    }
}
