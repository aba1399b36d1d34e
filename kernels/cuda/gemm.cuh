// What the matrix products share: how K is split, and the barriers of Hopper's copy engine.
//
// out[m][f] = sum over k of x[m][k] * matrix[f][k]. Tiles have features as rows and batch rows as columns, so that a
// tile for one row wastes little. A dot product is a chain over K in steps of 16 from zero, in f32; where K is split,
// the parts' sums are added in order, and then to what they are added to. None of it depends on the tile, so that a row
// has the same bytes at any batch size.
#pragma once

#include "common.cuh"
#include "epilogue.cuh"

/// Steps of 64 columns before part `split` of K.
__device__ __forceinline__ int split_start(const Output &output, int split) {
    return (output.columns + 63) / 64 * split / output.splits;
}

/// Adds the sums of part `split` of K to those of the parts before.
template <int COUNT>
__device__ __forceinline__ void add_part(float (&total)[COUNT], const float (&sums)[COUNT], int split) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) total[i] = split == 0 ? sums[i] : total[i] + sums[i];
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

/// Reads four floats of a block of the cluster, at what is `address` here.
__device__ __forceinline__ float4 load_from_block(uint32_t address, uint32_t rank) {
    float4 v;
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [remote];\n}\n"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "r"(address), "r"(rank)
        : "memory");
    return v;
}

/// The same for one float.
__device__ __forceinline__ float load_value_from_block(uint32_t address, uint32_t rank) {
    float value;
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %1, %2;\n"
        "ld.shared::cluster.f32 %0, [remote];\n}\n"
        : "=f"(value)
        : "r"(address), "r"(rank)
        : "memory");
    return value;
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
