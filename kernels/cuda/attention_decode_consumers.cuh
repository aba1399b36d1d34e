//! How a decode computes its units: the consumers, the closers, and the kernel around them.
//!
//! A unit is one split (`SPLIT_KEYS` positions) of one span for one key-value head. A CTA is persistent: its
//! producer warp streams the pages of unit after unit into a ring, four warps consume them. The scores of a tile
//! belong to one of the four, so that the tiles of a unit are scored at once; the tiles' maxima are exchanged,
//! each tile's weights follow from the greatest score up to and with it, and then each warp accumulates its own
//! columns of the values over all tiles in ascending order. That is the online softmax of `attention_prefill_*`,
//! rounding by rounding. Two more warps close units: whoever closes a span's last unit merges all of them, in
//! ascending order, while the consumers go on.
//!
//! Units are dealt out by a ticket, which decides who computes, never what. Every lane that has read arrives at a
//! barrier itself, not one lane for its warp: that costs no time, and racecheck follows it.
//! Invariant: `counters` are zero before and after every launch.
#pragma once

#include "attention_decode.cuh"

namespace millrace {
namespace {

// ---- The consumers ----

/// A consumer warp's state. A thread holds rows `2 * (lane % 4)` and the one after of the group, and of a page or
/// part the tokens or columns `lane / 4` and that plus 8.
template <class S>
struct Consumer {
    uint32_t query[S::HEAD / 16][2];
    float out[S::PARTS_PER_WARP][4];
    RowSum rows[2];
    uint32_t ring;
    uint32_t warp;
    uint32_t lane;
    /// The unit's first stage of keys.
    uint32_t base;
    /// Units so far.
    uint32_t count;
};

__device__ __forceinline__ void meet() { asm volatile("bar.sync 1, 128;" ::: "memory"); }

/// Takes the group's queries as the B operand; rows beyond the group are zero.
template <class S>
__device__ __forceinline__ void take_queries(Consumer<S>& me, const Board<S>& board, uint32_t group) {
    const bool live = me.lane / 4 < group;
    const bf16* from = &board.queries[me.count % NOTES][me.lane / 4][me.lane % 4 * 2];
#pragma unroll
    for (int step = 0; step < S::HEAD / 16; ++step) {
        me.query[step][0] = live ? *reinterpret_cast<const uint32_t*>(from + step * 16) : 0;
        me.query[step][1] = live ? *reinterpret_cast<const uint32_t*>(from + step * 16 + 8) : 0;
    }
}

/// Scores of a tile. Its stages are this warp's alone, so it arrives for the four consumers.
template <class S>
__device__ __forceinline__ void score_tile(float (&s)[S::PAGES][4], const Consumer<S>& me,
                                           Board<S>& board, const UnitNote& note, uint32_t tile) {
    const uint32_t page_first = note.page_first + tile * S::PAGES;
#pragma unroll
    for (uint32_t i = 0; i < S::PAGES; ++i) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.f;
#pragma unroll
    for (uint32_t part = 0; part < S::STAGES_PER_TILE; ++part) {
        if (page_first + part * S::STAGE_PAGES >= note.page_end) break;
        const Place<S> place = {me.base + tile * S::STAGES_PER_TILE + part};
        const uint32_t stage = me.ring + place.stage() * S::STAGE_BYTES;
        barrier_wait(shared_address(&board.full[place.stage()]), place.parity());
        // Pages that do not exist hold what an earlier stage left; their scores are hidden.
        if constexpr (S::KV == Kv::Bf16) {
#pragma unroll
            for (int step = 0; step < S::HEAD / 16; ++step) {
#pragma unroll
                for (uint32_t i = 0; i < S::STAGE_PAGES; ++i) {
                    uint32_t keys[4];
                    load_matrices(keys, stage + i * S::PAGE_BYTES + key_rows<S::HEAD>(me.lane, step));
                    multiply(s[part * S::STAGE_PAGES + i], keys, me.query[step][0], me.query[step][1]);
                }
            }
        } else {
#pragma unroll
            for (int step = 0; step < S::HEAD / 16; step += 2) {
#pragma unroll
                for (uint32_t i = 0; i < S::STAGE_PAGES; ++i) {
                    uint32_t codes[4], keys[4];
                    load_codes(codes, stage + i * S::PAGE_BYTES + step * 256 + me.lane * 16);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        widen_rows(keys, codes[2 * half], codes[2 * half + 1]);
                        multiply(s[part * S::STAGE_PAGES + i], keys, me.query[step + half][0],
                                 me.query[step + half][1]);
                    }
                }
            }
        }
        __syncwarp();
#pragma unroll
        for (uint32_t consumer = 0; consumer < CONSUMERS; ++consumer)
            barrier_arrive(shared_address(&board.free[place.stage()]));
    }
    const uint32_t key = page_first * PAGE_TOKENS;
    if (key >= note.first && key + tile_keys(S::HEAD) <= note.end) return;
#pragma unroll
    for (uint32_t i = 0; i < S::PAGES; ++i) {
        const uint32_t low = key + i * PAGE_TOKENS + me.lane / 4, high = low + 8;
        if (low < note.first || low >= note.end) s[i][0] = s[i][1] = minus_infinity();
        if (high < note.first || high >= note.end) s[i][2] = s[i][3] = minus_infinity();
    }
}

/// Clears this warp's columns of a page of values from token `first` on: unwritten memory may hold what is no
/// number, and 0 times that is no number either.
template <class S>
__device__ __forceinline__ void clear_tokens(const Consumer<S>& me, uint32_t page, uint32_t first) {
    for (uint32_t part = me.warp; part < S::PARTS; part += CONSUMERS) {
        const uint32_t token = first + me.lane / 2;
        if (token < PAGE_TOKENS)
            store16_shared(page + page_offset(S::HEAD, token, part * 16 + me.lane % 2 * 8) * 2, make_uint4(0, 0, 0, 0));
    }
    fence_async_proxy();
    __syncwarp();
}

/// Adds a tile's weighted values to this warp's columns.
template <class S>
__device__ __forceinline__ void accumulate_tile(Consumer<S>& me, Board<S>& board, const UnitNote& note,
                                                uint32_t tile, uint32_t values_base) {
    const uint32_t page_first = note.page_first + tile * S::PAGES;
    for (uint32_t part = 0; part < S::STAGES_PER_TILE; ++part) {
        const uint32_t first = page_first + part * S::STAGE_PAGES;
        if (first >= note.page_end) return;
        const Place<S> place = {values_base + tile * S::STAGES_PER_TILE + part};
        const uint32_t stage = me.ring + place.stage() * S::STAGE_BYTES;
        barrier_wait(shared_address(&board.full[place.stage()]), place.parity());
#pragma unroll
        for (uint32_t i = 0; i < S::STAGE_PAGES; ++i) {
            if (first + i >= note.page_end) break;
            const uint32_t page = stage + i * S::PAGE_BYTES;
            const bool partial = (first + i + 1) * PAGE_TOKENS > note.end;
            if (S::KV == Kv::Bf16 && partial) clear_tokens<S>(me, page, note.end % PAGE_TOKENS);
            const uint32_t live = S::KV == Kv::Fp8 && partial ? live_codes(me.lane, note.end % PAGE_TOKENS) : 0xffffffffu;
            const uint2 weights = board.weights[first + i - note.page_first][me.lane];
#pragma unroll
            for (uint32_t k = 0; k < S::PARTS_PER_WARP; ++k) {
                if (S::PARTS % CONSUMERS != 0 && me.warp + k * CONSUMERS >= S::PARTS) break;
                uint32_t values[4];
                if constexpr (S::KV == Kv::Bf16) {
                    load_matrices_transposed(values, page + value_rows<S::HEAD>(me.lane, me.warp + k * CONSUMERS));
                } else {
                    uint32_t codes[2];
                    load_codes(codes, page + (me.warp + k * CONSUMERS) * 256 + me.lane % 16 * 16);
                    widen_rows(values, codes[0] & live, codes[1] & live);
                }
                multiply(me.out[k], values, weights.x, weights.y);
            }
        }
        __syncwarp();
        barrier_arrive(shared_address(&board.free[place.stage()]));
    }
}

/// Scores this warp's tiles and puts their weights and sums on the board.
template <class S>
__device__ __forceinline__ void score_unit(const Consumer<S>& me, const AttentionArguments& arguments,
                                           Board<S>& board, const UnitNote& note, uint32_t tiles) {
    float(&all_tops)[S::TILES][ROWS] = board.tops[me.count % 2];
    float s[S::TILES_PER_WARP][S::PAGES][4];
#pragma unroll
    for (uint32_t i = 0; i < S::TILES_PER_WARP; ++i) {
        const uint32_t tile = me.warp + i * CONSUMERS;
#pragma unroll 1
        for (uint32_t round = 0; round < S::ROUNDS; ++round) {
            if (i > 0 || round > 0) meet();
            if (S::ROUNDS > 1 && me.warp / S::AT_ONCE != round) continue;
            if (tile >= tiles) continue;
            score_tile<S>(s[i], me, board, note, tile);
            cap_scores(s[i], arguments);
            const float even = __fmul_rn(tile_max_transposed<S::PAGES, 0>(s[i]), arguments.scale_log2);
            const float odd = __fmul_rn(tile_max_transposed<S::PAGES, 1>(s[i]), arguments.scale_log2);
            if (me.lane < 4) {
                all_tops[tile][2 * me.lane] = even;
                all_tops[tile][2 * me.lane + 1] = odd;
            }
        }
    }
    meet();
#pragma unroll
    for (uint32_t i = 0; i < S::TILES_PER_WARP; ++i) {
        const uint32_t tile = me.warp + i * CONSUMERS;
        if (tile >= tiles) break;
        float tops[2] = {minus_infinity(), minus_infinity()};
        for (uint32_t t = 0; t <= tile; ++t) {
            tops[0] = fmaxf(tops[0], all_tops[t][me.lane % 4 * 2]);
            tops[1] = fmaxf(tops[1], all_tops[t][me.lane % 4 * 2 + 1]);
        }
        const float even = soften_transposed<S::PAGES, 0>(s[i], anchor(tops[0]), arguments.scale_log2);
        const float odd = soften_transposed<S::PAGES, 1>(s[i], anchor(tops[1]), arguments.scale_log2);
        board.sums[tile][me.lane] = make_float2(even, odd);
#pragma unroll
        for (uint32_t page = 0; page < S::PAGES; ++page)
            board.weights[tile * S::PAGES + page][me.lane] =
                make_uint2(transposed(pack_bf16(s[i][page][0], s[i][page][1])),
                           transposed(pack_bf16(s[i][page][2], s[i][page][3])));
    }
    meet();
}

/// Accumulates this warp's columns over the unit's tiles, in ascending order.
template <class S>
__device__ __forceinline__ void accumulate_unit(Consumer<S>& me, Board<S>& board, const UnitNote& note,
                                                uint32_t tiles, uint32_t values_base) {
    me.rows[0] = me.rows[1] = empty_row();
#pragma unroll
    for (uint32_t k = 0; k < S::PARTS_PER_WARP; ++k)
        me.out[k][0] = me.out[k][1] = me.out[k][2] = me.out[k][3] = 0.f;
    for (uint32_t tile = 0; tile < tiles; ++tile) {
        const float2 sums = board.sums[tile][me.lane];
        float factors[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const float top = fmaxf(me.rows[row].top, board.tops[me.count % 2][tile][me.lane % 4 * 2 + row]);
            factors[row] = exp2_approx(__fsub_rn(me.rows[row].top, anchor(top)));
            me.rows[row].top = top;
            me.rows[row].sum = __fmaf_rn(me.rows[row].sum, factors[row], row == 0 ? sums.x : sums.y);
        }
#pragma unroll
        for (uint32_t k = 0; k < S::PARTS_PER_WARP; ++k) {
#pragma unroll
            for (int e = 0; e < 4; ++e) me.out[k][e] = __fmul_rn(me.out[k][e], factors[e % 2]);
        }
        accumulate_tile<S>(me, board, note, tile, values_base);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) me.rows[row].sum = row_sum_transposed(me.rows[row].sum);
}

/// Stores this warp's columns of a unit's unfinished result under its item.
template <class S>
__device__ __forceinline__ void store_partial(const Consumer<S>& me, const AttentionArguments& arguments,
                                              const UnitNote& note) {
    const uint32_t heads = arguments.kv_heads * arguments.group;
    float* stats = arguments.partials + uint64_t(arguments.items_max) * heads * S::HEAD;
#pragma unroll
    for (uint32_t row = 0; row < 2; ++row) {
        const uint32_t head = me.lane % 4 * 2 + row;
        if (head >= arguments.group) continue;
        const uint64_t place = uint64_t(note.item) * heads + note.kv_head * arguments.group + head;
#pragma unroll
        for (uint32_t k = 0; k < S::PARTS_PER_WARP; ++k) {
            const uint32_t part = me.warp + k * CONSUMERS;
            if (S::PARTS % CONSUMERS != 0 && part >= S::PARTS) break;
            float* to = arguments.partials + place * S::HEAD + part * 16 + me.lane / 4;
            to[0] = me.out[k][row];
            to[8] = me.out[k][2 + row];
        }
        if (me.warp == 0 && me.lane < 4)
            *reinterpret_cast<float2*>(stats + place * 2) = make_float2(me.rows[row].top, me.rows[row].sum);
    }
}

/// Writes this warp's columns of the output of a unit that is its span's only split.
template <class S>
__device__ __forceinline__ void store_output(const Consumer<S>& me, const AttentionArguments& arguments,
                                             const UnitNote& note) {
    const float inverse[2] = {output_factor<S::KV>(me.rows[0].sum, arguments),
                              output_factor<S::KV>(me.rows[1].sum, arguments)};
    bf16* to = arguments.out + uint64_t(note.row) * arguments.out_stride +
               (note.kv_head * arguments.group + me.lane / 4) * S::HEAD + me.lane % 4 * 2;
#pragma unroll
    for (uint32_t k = 0; k < S::PARTS_PER_WARP; ++k) {
        const uint32_t part = me.warp + k * CONSUMERS;
        if (S::PARTS % CONSUMERS != 0 && part >= S::PARTS) break;
        const float(&out)[4] = me.out[k];
        const uint32_t low = transposed(pack_bf16(finished(out[0], inverse[0]), finished(out[1], inverse[1])));
        const uint32_t high = transposed(pack_bf16(finished(out[2], inverse[0]), finished(out[3], inverse[1])));
        if (me.lane / 4 >= arguments.group) continue;
        *reinterpret_cast<uint32_t*>(to + part * 16) = low;
        *reinterpret_cast<uint32_t*>(to + part * 16 + 8) = high;
    }
}

/// A consumer warp: unit after unit, until there are no more.
template <class S>
__device__ __forceinline__ void consume(const AttentionArguments& arguments, Board<S>& board, uint32_t ring,
                                        uint32_t warp, uint32_t lane) {
    Consumer<S> me;
    me.ring = ring;
    me.warp = warp;
    me.lane = lane;
    me.base = 0;
    for (me.count = 0;; ++me.count) {
        const uint32_t slot = me.count % NOTES;
        barrier_wait(shared_address(&board.note_full[slot]), me.count / NOTES % 2);
        const UnitNote note = board.notes[slot];
        if (note.item == NO_ITEM) return;
        const uint32_t pages = note.page_end - note.page_first;
        const uint32_t stages = (pages + S::STAGE_PAGES - 1) / S::STAGE_PAGES;
        const uint32_t tiles = (pages + S::PAGES - 1) / S::PAGES;
        take_queries<S>(me, board, arguments.group);
        score_unit<S>(me, arguments, board, note, tiles);
        accumulate_unit<S>(me, board, note, tiles, me.base + stages);
        me.base += 2 * stages;
        if (note.splits == 1) store_output<S>(me, arguments, note);
        else store_partial<S>(me, arguments, note);
        __syncwarp();
        barrier_arrive(shared_address(&board.stored[slot]));
    }
}

// ---- The closers ----

/// A closer warp, of two that act together: counts each unit of a span of several, and merges them after the last.
/// It gives the notes back, too.
template <class S>
__device__ __forceinline__ void close(const AttentionArguments& arguments, Board<S>& board, uint32_t thread) {
    for (uint32_t count = 0;; ++count) {
        const uint32_t slot = count % NOTES, parity = count / NOTES % 2;
        barrier_wait(shared_address(&board.note_full[slot]), parity);
        const UnitNote note = board.notes[slot];
        if (note.item == NO_ITEM) return;
        barrier_wait(shared_address(&board.stored[slot]), parity);
        if (note.splits > 1) {
            if (thread == 0) {
                uint32_t* counter = arguments.counters + 1 + note.span * arguments.kv_heads + note.kv_head;
                __threadfence();
                const uint32_t ended = atomicAdd(counter, 1) + 1;
                __threadfence();
                if (ended == note.splits) *counter = 0;
                board.ended = ended;
            }
            asm volatile("bar.sync 2, 64;" ::: "memory");
            const bool last = board.ended == note.splits;
            asm volatile("bar.sync 2, 64;" ::: "memory");
            if (last)
                merge_parts<S::HEAD, S::KV, 32 * CLOSERS>(
                    arguments, {note.item - note.split, note.splits, note.row, note.kv_head}, thread);
        }
        __syncwarp();
        barrier_arrive(shared_address(&board.note_free[slot]));
    }
}

template <class S>
__device__ __forceinline__ void decode(const AttentionArguments& arguments) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Board<S>& board = *reinterpret_cast<Board<S>*>(memory);
    const uint32_t ring = shared_address(memory) + BOARD_BYTES;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#ifdef MILLRACE_BULK_COPY
    constexpr uint32_t PRODUCED = 1, PUBLISHED = 1;
#else
    constexpr uint32_t PRODUCED = 32, PUBLISHED = 33;
#endif
    if (threadIdx.x < S::STAGES) {
        barrier_init(shared_address(&board.full[threadIdx.x]), PRODUCED);
        barrier_init(shared_address(&board.free[threadIdx.x]), 32 * CONSUMERS);
    }
    if (threadIdx.x < NOTES) {
        barrier_init(shared_address(&board.note_full[threadIdx.x]), PUBLISHED);
        barrier_init(shared_address(&board.note_free[threadIdx.x]), 32 * CLOSERS);
        barrier_init(shared_address(&board.stored[threadIdx.x]), 32 * CONSUMERS);
    }
    fence_async_proxy();
    __syncthreads();
    release_successor();
    if (warp < CONSUMERS) consume<S>(arguments, board, ring, warp, lane);
    else if (warp == CONSUMERS) produce<S>(arguments, board, ring, lane);
    else close<S>(arguments, board, threadIdx.x - 32 * (CONSUMERS + 1));
    await_predecessor();
}

}  // namespace
}  // namespace millrace

#define MILLRACE_DECODE(NAME, HEAD, KV, RING)                                             \
    extern "C" __global__ void __launch_bounds__(millrace::DECODE_THREADS, 1)             \
        NAME##HEAD(const __grid_constant__ millrace::AttentionArguments arguments) {      \
        millrace::decode<millrace::Shape<HEAD, millrace::Kv::KV, millrace::RING>>(arguments); \
    }
#define MILLRACE_DECODES(NAME, KV, RING) \
    MILLRACE_DECODE(NAME, 64, KV, RING)  \
    MILLRACE_DECODE(NAME, 96, KV, RING)  \
    MILLRACE_DECODE(NAME, 128, KV, RING) \
    MILLRACE_DECODE(NAME, 256, KV, RING)
