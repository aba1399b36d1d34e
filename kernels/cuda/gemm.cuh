// What the matrix products share: how results leave, how K is split, and the barriers of Hopper's copy engine.
//
// out[m][f] = sum over k of x[m][k] * matrix[f][k]. Tiles have features as rows and batch rows as columns, so that a
// tile for one row wastes little. A dot product is a chain over K in steps of 16 from zero, in f32; where K is split,
// the parts' sums are added in order. Neither depends on the tile, so that a row has the same bytes at any batch size.
#pragma once

#include "common.cuh"

/// How a tile of sums leaves.
enum Epilogue {
    /// out = sum + bias, f32.
    VALUES,
    /// out += sum + bias, f32.
    ADD,
    /// Rows of the matrix alternate by 8: gate, up. out = silu(gate) * up, bf16.
    SILU_MUL,
};

/// The result's side of a product.
struct Output {
    void *out;
    /// One per feature, or null.
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
};

/// Steps of 64 columns before part `split` of K.
__device__ __forceinline__ int split_start(const Output &output, int split) {
    return (output.columns + 63) / 64 * split / output.splits;
}

/// Where a thread's part of a tile lies: features `feature` and `feature + 8`, rows `row` and `row + 1` of the batch.
struct Spot {
    int feature;
    int row;
};

/// What stands at a spot before sums are added; zero outside of the result.
__device__ __forceinline__ void load_before(const Output &output, Spot spot, float (&before)[4]) {
    const float *out = static_cast<const float *>(output.out);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int feature = spot.feature + i / 2 * 8, row = spot.row + i % 2;
        const bool inside = feature < output.features && row < output.rows;
        before[i] = inside ? out[size_t(row) * output.stride + feature] : 0.0f;
    }
}

/// Writes `before` plus the sums (plus bias) at a spot.
__device__ __forceinline__ void store_values(const Output &output, Spot spot, const float (&before)[4],
                                             const float *sums, const float (&bias)[2]) {
    float *out = static_cast<float *>(output.out);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int feature = spot.feature + i / 2 * 8, row = spot.row + i % 2;
        if (feature < output.features && row < output.rows)
            out[size_t(row) * output.stride + feature] = before[i] + (sums[i] + bias[i / 2]);
    }
}

/// Writes silu(gate) * up at a spot.
__device__ __forceinline__ void store_gated(const Output &output, Spot spot, const float *sums) {
    // Lanes 4 apart hold neighbouring features; one takes both features of a row, the other of the next row.
    const bool odd = (threadIdx.x / 4) % 2 == 1;
    const float mine = silu(sums[0]) * sums[2], other = silu(sums[1]) * sums[3];
    const float received = __shfl_xor_sync(0xffffffffu, odd ? mine : other, 4);
    const uint32_t pair = odd ? pack_bf16(received, other) : pack_bf16(mine, received);
    const int row = spot.row + (odd ? 1 : 0), target = spot.feature / 16 * 8 + (spot.feature % 8) / 2 * 2;
    if (row < output.rows && spot.feature < output.features) {
        auto *out = static_cast<__nv_bfloat16 *>(output.out) + size_t(row) * output.stride + target;
        *reinterpret_cast<uint32_t *>(out) = pair;
    }
}

__device__ __forceinline__ void load_bias(const Output &output, int feature, float (&bias)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const bool has = output.bias != nullptr && feature + 8 * half < output.features;
        bias[half] = has ? __ldg(output.bias + feature + 8 * half) : 0.0f;
    }
}

/// Writes a thread's sums: tiles of 8 rows of the batch, 4 sums each. What is added to is loaded some tiles at a time,
/// so that the loads do not wait for each other's stores.
template <Epilogue EPILOGUE, int TILES>
__device__ __forceinline__ void store_sums(const Output &output, Spot spot, const float (&sums)[TILES * 4]) {
    if constexpr (EPILOGUE == SILU_MUL) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) store_gated(output, {spot.feature, spot.row + 8 * tile}, &sums[4 * tile]);
    } else {
        constexpr int AHEAD = TILES < 8 ? TILES : 8;
        float bias[2];
        load_bias(output, spot.feature, bias);
#pragma unroll
        for (int first = 0; first < TILES; first += AHEAD) {
            float before[AHEAD][4] = {};
            if constexpr (EPILOGUE == ADD) {
#pragma unroll
                for (int i = 0; i < AHEAD; ++i) load_before(output, {spot.feature, spot.row + 8 * (first + i)}, before[i]);
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i)
                store_values(output, {spot.feature, spot.row + 8 * (first + i)}, before[i], &sums[4 * (first + i)], bias);
        }
    }
}

#if defined(MILLRACE_SM90)
#include "wgmma.cuh"

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// Waits until the phase of this parity has completed.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

/// Arrives at the barrier of this place in a block of the cluster. It only says that the copy engine may write again
/// what the tensor cores have read; a wider order than the block's is not needed, and would cost a fence per stage.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

/// Waits for all blocks of the cluster; orders nothing.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

/// Waits for all blocks of the cluster and sees what they wrote.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// As copy_box, into the same place of every block of `mask`, whose barriers count the bytes.
__device__ __forceinline__ void copy_box_to_all(uint32_t target, const void *map, int column, int row, uint32_t barrier,
                                                uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%2, %3}], [%4], %5;"
        ::"r"(target), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(mask)
        : "memory");
}

/// Copies a box of a tensor, 64 columns wide, into shared memory; the barrier counts its bytes.
__device__ __forceinline__ void copy_box(uint32_t target, const void *map, int column, int row, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(target), "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}
#endif
