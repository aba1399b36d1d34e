//! What both forms of decode attention share: the splits of a span, and how their results are merged.
#pragma once

#include "attention_fp8.cuh"

namespace millrace {
namespace {

constexpr uint32_t SPLIT_PAGES = SPLIT_KEYS / PAGE_TOKENS;
static_assert(SPLIT_PAGES == 32, "a lane holds one entry of the block table");
constexpr uint32_t NO_ITEM = 0xffffffffu;

/// Partial results of a span and key-value head: under items `[first_item, first_item + parts)`.
struct Parts {
    uint32_t first_item;
    uint32_t parts;
    uint32_t row;
    uint32_t kv_head;
};

/// Merges the parts in ascending order and writes the output; `THREADS` threads take part.
template <int HEAD, Kv KV, uint32_t THREADS>
__device__ __forceinline__ void merge_parts(const AttentionArguments& arguments, const Parts& of, uint32_t thread) {
    constexpr uint32_t AHEAD = 8;
    const uint32_t heads = arguments.kv_heads * arguments.group;
    const float* stats = arguments.partials + uint64_t(arguments.items_max) * heads * HEAD;
    for (uint32_t at = thread * 4; at < arguments.group * HEAD; at += 4 * THREADS) {
        const uint32_t head = of.kv_head * arguments.group + at / HEAD;
        RowSum total = empty_row();
        float sum[4] = {};
        for (uint32_t base = 0; base < of.parts; base += AHEAD) {
            float4 part[AHEAD];
            float2 stat[AHEAD];
#pragma unroll
            for (uint32_t i = 0; i < AHEAD; ++i) {
                const uint64_t place = uint64_t(of.first_item + min(base + i, of.parts - 1)) * heads + head;
                part[i] = __ldcg(reinterpret_cast<const float4*>(arguments.partials + place * HEAD + at % HEAD));
                stat[i] = __ldcg(reinterpret_cast<const float2*>(stats + place * 2));
            }
#pragma unroll
            for (uint32_t i = 0; i < AHEAD; ++i) {
                if (base + i >= of.parts) break;
                const MergeFactors factors = merge_rows(total, {stat[i].x, stat[i].y});
                sum[0] = merged(sum[0], part[i].x, factors);
                sum[1] = merged(sum[1], part[i].y, factors);
                sum[2] = merged(sum[2], part[i].z, factors);
                sum[3] = merged(sum[3], part[i].w, factors);
            }
        }
        const float inverse = output_factor<KV>(total.sum, arguments);
        const uint2 packed = {pack_bf16(finished(sum[0], inverse), finished(sum[1], inverse)),
                              pack_bf16(finished(sum[2], inverse), finished(sum[3], inverse))};
        bf16* to = arguments.out + uint64_t(of.row) * arguments.out_stride + head * HEAD + at % HEAD;
        *reinterpret_cast<uint2*>(to) = packed;
    }
}

}  // namespace
}  // namespace millrace
