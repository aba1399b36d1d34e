//! What the prefill kernels share: which rows and keys a tile has, the merging of its splits, its output.

#pragma once

#include "attention_fp8.cuh"

namespace millrace {

/// What a CTA works on.
struct Work {
    AttentionSpan span;
    uint32_t kv_head;
    /// First packed row of the tile, and the number of packed rows of the span.
    uint32_t packed_first;
    uint32_t packed_rows;
    /// Positions of the first and the last row of the tile.
    uint32_t position_first;
    uint32_t position_last;
};

/// The work of a tile of `ROWS` packed rows.
template <uint32_t ROWS>
__device__ __forceinline__ Work find_work(const AttentionArguments& arguments, PrefillTile tile, uint32_t kv_head) {
    Work work;
    work.span = arguments.spans[tile.span];
    work.kv_head = kv_head;
    work.packed_first = tile.tile * ROWS;
    work.packed_rows = work.span.rows * arguments.group;
    const uint32_t packed_last = min(work.packed_first + ROWS, work.packed_rows) - 1;
    const uint32_t base = work.span.context - work.span.rows;
    work.position_first = base + work.packed_first / arguments.group;
    work.position_last = base + packed_last / arguments.group;
    return work;
}

/// Address of the query (or output) of a packed row.
template <int HEAD>
__device__ __forceinline__ uint64_t row_place(const AttentionArguments& arguments, const Work& work, uint32_t packed,
                                              uint32_t stride) {
    const uint64_t row = work.span.first_row + packed / arguments.group;
    return row * stride + (work.kv_head * arguments.group + packed % arguments.group) * HEAD;
}

/// The two rows of a thread: a packed row and the one 8 after it.
struct RowPair {
    /// The running split, and all splits before it.
    RowSum split[2];
    RowSum total[2];
    /// The keys that each row sees.
    uint32_t first[2];
    uint32_t end[2];
};

/// Notes which keys the rows see; `packed` is the first of them.
__device__ __forceinline__ void see_keys(RowPair& rows, const AttentionArguments& arguments, const Work& work,
                                         uint32_t packed) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t row = (packed + half * 8) / arguments.group;
        const uint32_t position = min(work.span.context - work.span.rows + row, work.position_last);
        rows.first[half] = window_first(position, arguments.window);
        rows.end[half] = position + 1;
    }
}

__device__ __forceinline__ RowPair begin_rows(const AttentionArguments& arguments, const Work& work, uint32_t packed) {
    RowPair rows;
    see_keys(rows, arguments, work, packed);
#pragma unroll
    for (int half = 0; half < 2; ++half) rows.split[half] = rows.total[half] = empty_row();
    return rows;
}

template <int HEAD>
__device__ __forceinline__ void clear(float (&out)[HEAD / 8][4]) {
#pragma unroll
    for (int j = 0; j < HEAD / 8; ++j) out[j][0] = out[j][1] = out[j][2] = out[j][3] = 0.f;
}

/// Ends a split: merges its rows and `out` into the totals and, unless it is the `last`, clears `out`. The totals
/// of `out` lie in shared memory, `THREADS` apart; `totals` is this thread's place. The total of the `first` split
/// is that split itself.
template <int HEAD, int THREADS>
__device__ __forceinline__ void end_split(float (&out)[HEAD / 8][4], RowSum (&split)[2], RowSum (&total)[2],
                                          float4* totals, bool first, bool last) {
    MergeFactors factors[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        split[half].sum = row_sum(split[half].sum);
        if (first) total[half] = split[half];
        else factors[half] = merge_rows(total[half], split[half]);
        split[half] = empty_row();
    }
    if (!first) {
        // Four places at a time, so that their reads overlap.
#pragma unroll
        for (int from = 0; from < HEAD / 8; from += 4) {
            float4 before[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) before[i] = totals[(from + i) * THREADS];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float(&sum)[4] = out[from + i];
                sum[0] = merged(before[i].x, sum[0], factors[0]);
                sum[1] = merged(before[i].y, sum[1], factors[0]);
                sum[2] = merged(before[i].z, sum[2], factors[1]);
                sum[3] = merged(before[i].w, sum[3], factors[1]);
            }
        }
    }
    if (last) return;
#pragma unroll
    for (int j = 0; j < HEAD / 8; ++j)
        totals[j * THREADS] = make_float4(out[j][0], out[j][1], out[j][2], out[j][3]);
    clear<HEAD>(out);
}

/// Writes the thread's share of two finished rows.
template <int HEAD, Kv KV>
__device__ __forceinline__ void store_output(const float (&out)[HEAD / 8][4], const RowPair& rows,
                                             const AttentionArguments& arguments, const Work& work,
                                             uint32_t packed_row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t packed = packed_row + half * 8;
        if (packed >= work.packed_rows) continue;
        const float inverse = output_factor<KV>(rows.total[half].sum, arguments);
        bf16* to = arguments.out + row_place<HEAD>(arguments, work, packed, arguments.out_stride) +
                   threadIdx.x % 4 * 2;
#pragma unroll
        for (int j = 0; j < HEAD / 8; ++j)
            *reinterpret_cast<uint32_t*>(to + j * 8) =
                pack_bf16(finished(out[j][2 * half], inverse), finished(out[j][2 * half + 1], inverse));
    }
}

}  // namespace millrace
