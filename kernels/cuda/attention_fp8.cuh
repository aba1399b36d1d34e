//! Pages of 8-bit floats as operands of the tensor cores: codes become bf16 in registers, right after they are read.
//!
//! Invariant: a warp multiplies the numbers that it would multiply if the page held their bf16 values, in the same
//! order, so every kernel gives a row the same bytes, and those are the bytes of a bf16 cache of these values. What is
//! not a number stays so.

#pragma once

#include "attention_tile.cuh"
#include "e4m3.cuh"

namespace millrace {

/// Reads four 8 x 16 matrices of codes; `matrices` is this lane's row of them. Each thread gets four codes of row
/// `lane / 4`: columns `2 * (lane % 4)`, the one after, and both plus 8, which `fp8_place` has put side by side.
__device__ __forceinline__ void load_codes(uint32_t (&codes)[4], uint32_t matrices) { load_matrices(codes, matrices); }

/// Two of them; lanes 0 to 15 name the rows.
__device__ __forceinline__ void load_codes(uint32_t (&codes)[2], uint32_t matrices) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(codes[0]), "=r"(codes[1])
                 : "r"(matrices)
                 : "memory");
}

/// The codes of 16 rows of a page's group as the A operand: rows `lane / 4` and that plus 8, both halves of columns.
__device__ __forceinline__ void widen_rows(uint32_t (&a)[4], uint32_t low_rows, uint32_t high_rows) {
    widen_e4m3(low_rows, a[0], a[2]);
    widen_e4m3(high_rows, a[1], a[3]);
}

/// Keeps, of four codes of values, those of tokens below `live` of the page: what was never written may be no number,
/// and 0 times that is no number either.
__device__ __forceinline__ uint32_t live_codes(uint32_t lane, uint32_t live) {
    const uint32_t token = lane % 4 * 2;
    return (token < live ? 0xffu : 0u) | (token + 1 < live ? 0xff00u : 0u) | (token + 8 < live ? 0xff0000u : 0u) |
           (token + 9 < live ? 0xff000000u : 0u);
}

}  // namespace millrace
