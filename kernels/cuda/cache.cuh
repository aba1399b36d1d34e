// Writing keys and values of one row into their page, two neighbouring elements of a head at a time.
#pragma once

#include "attention.cuh"
#include "common.cuh"
#include "e4m3.cuh"

/// A layer's cache and where in it one row of one head goes.
struct PageTarget {
    /// Pages of bf16, or of 8-bit floats.
    void *cache;
    bool fp8;
    bool is_value;
    /// block * 16 + place in the block.
    uint32_t slot;
    uint32_t kv_head;
    uint32_t kv_heads;
    uint32_t head_dim;
    /// One over the scale of a cache of 8 bits.
    float factor;
};

/// Writes elements `i` and `i + 1` of a head; `i` is even.
__device__ __forceinline__ void write_pair(const PageTarget &target, uint32_t i, float low, float high) {
    const uint32_t token = target.slot % 16, dim = target.head_dim;
    const uint64_t page =
        millrace::page_start(target.slot / 16, target.is_value ? 1 : 0, target.kv_heads, target.kv_head, dim);
    if (!target.fp8) {
        auto *elements = static_cast<__nv_bfloat16 *>(target.cache) + page;
        *reinterpret_cast<uint32_t *>(elements + millrace::page_offset(dim, token, i)) = pack_bf16(low, high);
        return;
    }
    uint8_t *elements = static_cast<uint8_t *>(target.cache) + page;
    const uint32_t codes = millrace::e4m3_of(low * target.factor, high * target.factor);
    if (target.is_value) {
        // The elements of a value lie apart, for its page is read along the tokens.
        elements[millrace::fp8_value_offset(token, i)] = uint8_t(codes);
        elements[millrace::fp8_value_offset(token, i + 1)] = uint8_t(codes >> 8);
    } else {
        *reinterpret_cast<uint16_t *>(elements + millrace::fp8_key_offset(token, i)) = uint16_t(codes);
    }
}
