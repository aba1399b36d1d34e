// What every kernel needs: number formats, reductions of fixed order, and programmatic dependent launch.
//
// Kernels of a step follow each other in one stream. Each lets its successor start early (launch_dependents) and
// waits for its predecessor (wait_for_predecessor) before it touches anything that a step writes; weights and tables
// may be read before. Invariant: a row's results depend on that row alone, never on the grid or the other rows.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MILLRACE_SM90 1
#endif

/// Returns when all kernels before this one have ended and their writes can be seen.
__device__ __forceinline__ void wait_for_predecessor() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next kernel's blocks start as soon as there is room for them.
__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// One row of a step, as the host writes it.
struct Row {
    uint32_t token;
    uint32_t position;
    /// block * 16 + place in the block where keys and values go; NO_SLOT for rows that pad a step.
    uint32_t slot;
    /// Row of the step before whose choice is this row's token, or NO_SLOT: the token is known.
    uint32_t feed;
};

constexpr uint32_t NO_SLOT = 0xffffffffu;

/// Sum over the block, in an order that depends on the number of threads only; every thread gets it.
template <int THREADS>
__device__ __forceinline__ float block_sum(float value) {
    constexpr int WARPS = THREADS / 32;
    __shared__ float partial[WARPS];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    if constexpr (WARPS == 1) return value;
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = partial[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) sum += partial[warp];
    return sum;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

/// Two floats as two bf16, the first in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

/// What a gate goes through: SiLU, x / (1 + e^-x), or GELU by its approximation with a hyperbolic tangent, which is
/// x / (1 + e^-z) with z = 2 sqrt(2 / pi) (x + 0.044715 x^3). To about 2^-21 of itself: the hardware's power of two and
/// reciprocal, without branches.
__device__ __forceinline__ float gated(float x, bool gelu) {
    const float z = gelu ? x * __fmaf_rn(x * x, 0.07135481f, 1.59576912f) : x;
    float power, reciprocal;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(z * -1.44269504f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + power));
    return x * reciprocal;
}
