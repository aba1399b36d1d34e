//! Decode attention's units of work and their way to the consumers: the shared memory of a CTA, the look-up of a
//! unit, and the producer that streams its pages into a ring.
//!
//! The producer alone reads block tables; consumers see pages in the order in which they were streamed. A stage is
//! refilled only when its consumers have given it back.
#pragma once

#include "attention_splits.cuh"

namespace millrace {
namespace {

constexpr uint32_t CONSUMERS = 4;
constexpr uint32_t CLOSERS = 2;
static_assert(32 * (CONSUMERS + 1 + CLOSERS) == DECODE_THREADS);
/// Units between the producer and the closers.
constexpr uint32_t NOTES = 4;
constexpr uint32_t ROWS = GROUP_MAX;

#ifdef MILLRACE_BULK_COPY
constexpr uint32_t RING_BYTES = 192 * 1024;
#else
constexpr uint32_t RING_BYTES = 128 * 1024;
#endif
constexpr uint32_t SMALL_RING_BYTES = 64 * 1024;
constexpr uint32_t BOARD_BYTES = 32 * 1024;
static_assert(BOARD_BYTES + RING_BYTES <= decode_shared_bytes(RING_BYTES > 128 * 1024 ? 227 * 1024 : 163 * 1024));
static_assert(BOARD_BYTES + SMALL_RING_BYTES <= decode_shared_bytes(99 * 1024));

template <int HEAD_, Kv KV_, uint32_t RING>
struct Shape {
    static constexpr int HEAD = HEAD_;
    static constexpr Kv KV = KV_;
    static constexpr uint32_t PAGE_BYTES = HEAD * PAGE_TOKENS * element_bytes(KV);
    static constexpr uint32_t PAGES = tile_keys(HEAD) / PAGE_TOKENS;
    static constexpr uint32_t TILES = SPLIT_KEYS / tile_keys(HEAD);
    /// Tiles that a warp scores: `warp`, `warp + CONSUMERS`, ...
    static constexpr uint32_t TILES_PER_WARP = TILES / CONSUMERS;
    static_assert(TILES % CONSUMERS == 0);
    /// Parts of 16 columns of the values that a warp accumulates: `warp`, `warp + CONSUMERS`, ...
    static constexpr uint32_t PARTS = HEAD / 16;
    static constexpr uint32_t PARTS_PER_WARP = (PARTS + CONSUMERS - 1) / CONSUMERS;
    /// A stage of the ring: four pages of keys or of values in bf16, or eight in 8 bits.
    static constexpr uint32_t STAGE_PAGES = KV == Kv::Bf16 || PAGES < 8 ? 4 : 8;
    static constexpr uint32_t STAGES_PER_TILE = PAGES / STAGE_PAGES;
    static constexpr uint32_t STAGE_BYTES = STAGE_PAGES * PAGE_BYTES;
    static constexpr uint32_t STAGES = RING / STAGE_BYTES < 16 ? RING / STAGE_BYTES : 16;
    /// Warps that score between two meetings, of which there are so many more. A warp may wait for a stage only when the
    /// use before it has come, or it would take that for its own: so what they score must fit into the ring.
    static constexpr uint32_t AT_ONCE = CONSUMERS * STAGES_PER_TILE <= STAGES ? CONSUMERS : CONSUMERS / 2;
    static constexpr uint32_t ROUNDS = CONSUMERS / AT_ONCE;
    static_assert(AT_ONCE * STAGES_PER_TILE <= STAGES);
};

/// What the producer tells the consumers of a unit.
struct UnitNote {
    /// Index of the decode item, or NO_ITEM: there are no more.
    uint32_t item;
    uint32_t kv_head;
    uint32_t row;
    uint32_t span;
    /// Splits of the span that are computed, and which of them this is.
    uint32_t splits;
    uint32_t split;
    /// Pages `[page_first, page_end)`; the row sees positions `[first, end)` of them.
    uint32_t page_first;
    uint32_t page_end;
    uint32_t first;
    uint32_t end;
};

/// Shared memory before the ring.
template <class S>
struct Board {
    uint64_t full[16];
    uint64_t free[16];
    uint64_t note_full[NOTES];
    uint64_t note_free[NOTES];
    /// The consumers have stored their columns of the unit.
    uint64_t stored[NOTES];
    UnitNote notes[NOTES];
    /// The group's queries.
    alignas(16) bf16 queries[NOTES][ROWS][S::HEAD];
    /// Units of the span that had ended when this one had.
    uint32_t ended;
    /// Greatest score of each tile and row, times the scale; of a unit and the one before.
    float tops[2][S::TILES][ROWS];
    /// Each lane's share of the weights' sums of its two rows.
    float2 sums[S::TILES][32];
    /// The weights of each page as the B operand.
    uint2 weights[SPLIT_PAGES][32];
};
static_assert(sizeof(Board<Shape<256, Kv::Bf16, RING_BYTES>>) <= BOARD_BYTES);

/// A place in the ring, which both sides count up alike.
template <class S>
struct Place {
    uint32_t count;
    __device__ uint32_t stage() const { return count % S::STAGES; }
    __device__ uint32_t parity() const { return count / S::STAGES % 2; }
};

// ---- The producer ----

/// Looks a unit up. `lane` of the producer keeps the block of page `lane` modulo 32 in `block`. Returns no item for
/// a split that lies before the window.
__device__ __forceinline__ UnitNote look_up(const AttentionArguments& arguments, uint32_t unit, uint32_t tile,
                                            uint32_t lane, uint32_t& block) {
    UnitNote note;
    note.item = unit / arguments.kv_heads;
    note.kv_head = unit % arguments.kv_heads;
    const DecodeItem work = arguments.decode_items[note.item];
    const AttentionSpan span = arguments.spans[work.span];
    note.row = span.first_row;
    note.span = work.span;
    note.first = window_first(span.context - 1, arguments.window);
    const uint32_t split_first = note.first / SPLIT_KEYS;
    note.splits = (span.context - 1) / SPLIT_KEYS + 1 - split_first;
    note.split = work.split - split_first;
    note.page_first = max(work.split * SPLIT_KEYS, note.first / tile * tile) / PAGE_TOKENS;
    note.end = min(span.context, (work.split + 1) * SPLIT_KEYS);
    note.page_end = (note.end + PAGE_TOKENS - 1) / PAGE_TOKENS;
    const uint32_t base = work.split * SPLIT_PAGES;
    const uint32_t mine = base + (lane + 32 - base % 32) % 32;
    block = mine >= note.page_first && mine < note.page_end ? arguments.tables[span.table + mine] : 0;
    if (work.split < split_first) note.item = NO_ITEM;
    return note;
}

/// Streams a unit's keys (`value` 0) or values (1) into the ring.
template <class S>
__device__ __forceinline__ void stream(const AttentionArguments& arguments, Board<S>& board, uint32_t ring,
                                       Place<S>& place, const UnitNote& note, uint32_t value, uint32_t block,
                                       uint32_t lane) {
    const uint32_t head = note.kv_head / arguments.parts;
    for (uint32_t page = note.page_first; page < note.page_end; page += S::STAGE_PAGES, ++place.count) {
        const uint32_t stage = place.stage(), full = shared_address(&board.full[stage]);
        const uint32_t pages = min(S::STAGE_PAGES, note.page_end - page);
        const uint32_t to = ring + stage * S::STAGE_BYTES;
        barrier_wait(shared_address(&board.free[stage]), place.parity() ^ 1);
#ifdef MILLRACE_BULK_COPY
        const uint32_t mine = __shfl_sync(0xffffffffu, block, (page + lane) % 32);
        if (lane == 0) barrier_expect(full, pages * S::PAGE_BYTES);
        __syncwarp();
        if (lane < pages)
            copy_bulk_once(to + lane * S::PAGE_BYTES, page_address<S::HEAD, S::KV>(arguments, mine, value, head),
                           S::PAGE_BYTES, full);
#else
        for (uint32_t i = 0; i < pages; ++i) {
            const uint32_t other = __shfl_sync(0xffffffffu, block, (page + i) % 32);
            const char* from = page_address<S::HEAD, S::KV>(arguments, other, value, head);
            for (uint32_t at = lane * 16; at < S::PAGE_BYTES; at += 512)
                copy16_async(to + i * S::PAGE_BYTES + at, from + at);
        }
        barrier_arrive_after_copies(full);
#endif
    }
}

/// Puts a unit on the board, its queries with it.
template <class S>
__device__ __forceinline__ void publish(const AttentionArguments& arguments, Board<S>& board, uint32_t count,
                                        const UnitNote& note, uint32_t lane) {
    const uint32_t slot = count % NOTES, full = shared_address(&board.note_full[slot]);
    barrier_wait(shared_address(&board.note_free[slot]), count / NOTES % 2 ^ 1);
    if (lane == 0) board.notes[slot] = note;
    const uint32_t bytes = note.item == NO_ITEM ? 0 : arguments.group * S::HEAD * 2;
    const bf16* from = arguments.queries + uint64_t(note.row) * arguments.query_stride +
                       note.kv_head * arguments.group * S::HEAD;
#ifdef MILLRACE_BULK_COPY
    if (lane == 0) {
        barrier_expect(full, bytes);
        if (bytes != 0) copy_bulk(shared_address(board.queries[slot]), from, bytes, full);
    }
#else
    for (uint32_t at = lane * 16; at < bytes; at += 512)
        copy16_async(shared_address(board.queries[slot]) + at, reinterpret_cast<const char*>(from) + at);
    barrier_arrive_after_copies(full);
    if (lane == 0) barrier_arrive(full);
#endif
}

/// Draws the next unit, in lane 0; `units` and more: there are none.
__device__ __forceinline__ uint32_t draw(const AttentionArguments& arguments, uint32_t units, uint32_t lane) {
    if (lane != 0 || units <= gridDim.x) return units;
    const uint32_t ticket = atomicAdd(arguments.counters, 1);
    // As many tickets are drawn as there are units: one for each unit not dealt, one in vain per CTA.
    if (ticket + 1 == units) arguments.counters[0] = 0;
    return gridDim.x + ticket;
}

/// The producer warp: deals itself units and streams them. While the keys of one stream, the next is drawn; while its
/// values do, the next is looked up. No unit is drawn earlier: another CTA may be free before this one.
template <class S>
__device__ __forceinline__ void produce(const AttentionArguments& arguments, Board<S>& board, uint32_t ring,
                                        uint32_t lane) {
    const uint32_t units = arguments.counts->decode_items * arguments.kv_heads;
    Place<S> place = {0};
    uint32_t count = 0, block = 0, next_block = 0;
    UnitNote note = {}, next_note = {};
    if (blockIdx.x < units) {
        note = look_up(arguments, blockIdx.x, tile_keys(S::HEAD), lane, block);
        await_predecessor();
        while (true) {
            const uint32_t drawn = draw(arguments, units, lane);
            if (note.item != NO_ITEM) {
                publish<S>(arguments, board, count++, note, lane);
                stream<S>(arguments, board, ring, place, note, 0, block, lane);
            }
            const uint32_t next = __shfl_sync(0xffffffffu, drawn, 0);
            if (next < units) next_note = look_up(arguments, next, tile_keys(S::HEAD), lane, next_block);
            if (note.item != NO_ITEM) stream<S>(arguments, board, ring, place, note, 1, block, lane);
            if (next >= units) break;
            note = next_note;
            block = next_block;
        }
    }
    note.item = NO_ITEM;
    publish<S>(arguments, board, count, note, lane);
}

}  // namespace
}  // namespace millrace
