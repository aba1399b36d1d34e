//! The 8-bit float e4m3 of the Open Compute Project, as `kernels/src/e4m3.rs` has it: to nearest, ties to even, beyond
//! 448 it saturates, what is not a number stays so.
//!
//! Chips from sm_89 on convert in hardware; others compute the same bits.

#pragma once

#include <cstdint>

namespace millrace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define MILLRACE_CONVERTS_E4M3 1
#endif

/// The code nearest to a value, in software.
__host__ __device__ __forceinline__ uint32_t e4m3_of(float value) {
    union {
        float number;
        uint32_t bits;
    } in = {value}, clamped, shifted;
    const uint32_t sign = in.bits >> 24 & 0x80;
    const uint32_t magnitude = in.bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7f;
    clamped.bits = magnitude > 0x43e00000 ? 0x43e00000 : magnitude;  // 448
    // Adding 2^14 leaves a multiple of 2^-9, the step below 2^-6, in the low bits of the sum.
    shifted.number = clamped.number + 16384.f;
    const uint32_t normal = ((clamped.bits + 0x7ffff + (clamped.bits >> 20 & 1)) >> 20) - (120 << 3);
    return sign | (clamped.bits < 0x3c800000 ? shifted.bits & 0xf : normal);
}

/// The codes nearest to two values, the first in the low byte.
__device__ __forceinline__ uint32_t e4m3_of(float low, float high) {
#ifdef MILLRACE_CONVERTS_E4M3
    uint16_t codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
#else
    return e4m3_of(low) | e4m3_of(high) << 8;
#endif
}

/// The values of four codes as bf16, which holds them exactly: of the two low bytes in `low`, of the others in `high`.
__device__ __forceinline__ void widen_e4m3(uint32_t codes, uint32_t& low, uint32_t& high) {
#ifdef MILLRACE_CONVERTS_E4M3
    asm("{\n.reg .b16 c0, c1, h0, h1, h2, h3;\n.reg .b32 p0, p1;\n.reg .f32 f0, f1, f2, f3;\n"
        "mov.b32 {c0, c1}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 p0, c0;\ncvt.rn.f16x2.e4m3x2 p1, c1;\n"
        "mov.b32 {h0, h1}, p0;\nmov.b32 {h2, h3}, p1;\n"
        "cvt.f32.f16 f0, h0;\ncvt.f32.f16 f1, h1;\ncvt.f32.f16 f2, h2;\ncvt.f32.f16 f3, h3;\n"
        "cvt.rn.bf16x2.f32 %0, f1, f0;\ncvt.rn.bf16x2.f32 %1, f3, f2;\n}"
        : "=r"(low), "=r"(high)
        : "r"(codes));
#else
    // Exponent and mantissa move to their place in bf16, which makes a number 2^-120 times the value, subnormal or not;
    // the product by 2^120 is exact.
    const uint32_t even = (codes & 0xff) | (codes & 0xff00) << 8, odd = codes >> 16 & 0xff | codes >> 8 & 0xff0000;
    const auto widened = [](uint32_t pair) {
        const uint32_t small = (pair & 0x7f007f) << 4 | (pair & 0x800080) << 8;
        uint32_t value;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(value) : "r"(small), "r"(0x7b807b80), "r"(0x80008000));
        if ((pair & 0x7f) == 0x7f) value |= 0x7fff;
        if ((pair & 0x7f0000) == 0x7f0000) value |= 0x7fff0000;
        return value;
    };
    low = widened(even);
    high = widened(odd);
#endif
}

}  // namespace millrace
