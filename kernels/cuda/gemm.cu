// Matrix products on Hopper: the copy engine fills a ring of stages, warpgroups multiply out of it.
//
// gemm_wide: 128 features by 64 to 192 rows of the batch; two blocks with neighbouring features share the rows of the
// batch, of which each fetches half for both. gemm_walk: the same with up to 256 rows, in as many pairs as the chip has
// room for, each of which takes tile after tile: the ring fills for the next one while sums leave. gemm_thin: 64
// features by 8 to 64 rows, two blocks to a multiprocessor. Where K has parts, the blocks of a cluster take one each and
// add their sums in order through each other's shared memory (thin, wide); pairs of blocks do the same through the
// device's memory, for clusters of four leave part of the chip idle (gemm_apart, and gemm_narrow with blocks of 64
// features, where there are too few for the chip); or one pair takes the parts in turn and adds them in registers
// (walk). All compute the same chains (see gemm.cuh) and so the same bytes. A producer asks for weights before its
// predecessor's end, which keeps memory busy between the small kernels of a decode.
//
// Bytes: matrix once per batch tile, batch rows once per pair of feature tiles. Operations: 2 * rows * features *
// columns.
#include <cuda.h>

#include "gemm_tiles.cuh"

#if defined(MILLRACE_SM90)
namespace {

/// The stage's rows of the matrix.
template <typename S>
__device__ __forceinline__ void copy_matrix(uint32_t target, const CUtensorMap &map, const Place &place, int step,
                                            uint32_t barrier) {
#pragma unroll
    for (int group = 0; group < S::GROUPS; ++group)
        copy_box(target + group * MATRIX_BOX, &map, (place.begin + step) * COLUMNS,
                 place.feature + group * GROUP_FEATURES, barrier);
}

/// The stage's rows of the batch: all of them, or this block's half for both blocks of the pair.
template <typename S>
__device__ __forceinline__ void copy_batch(uint32_t target, const CUtensorMap &map, const Place &place, int step,
                                           uint32_t barrier) {
    const int column = (place.begin + step) * COLUMNS;
    if constexpr (S::PAIR) {
        constexpr int BOXES = S::BATCH / S::BOX_ROWS / 2;
        const uint16_t mask = uint16_t(1u << place.rank_of(0) | 1u << place.rank_of(1));
#pragma unroll
        for (int box = 0; box < BOXES; ++box) {
            const int row = (place.pair * BOXES + box) * S::BOX_ROWS;
            copy_box_to_all(target + row * ROW_BYTES, &map, column, place.row + row, barrier, mask);
        }
    } else {
#pragma unroll
        for (int row = 0; row < S::BATCH; row += S::BOX_ROWS)
            copy_box(target + row * ROW_BYTES, &map, column, place.row + row, barrier);
    }
}

/// One thread fills the ring. The first stages' weights do not wait for the kernel before.
template <typename S, Parts PARTS>
__device__ __forceinline__ void produce(Ring<S> ring, const CUtensorMap &matrix, const CUtensorMap &batch, Place place,
                                        const Output &output) {
    int ahead = min(place.steps, S::STAGES);
    for (int step = 0; step < ahead; ++step) {
        barrier_expect(ring.full + 8 * step, S::STAGE_BYTES);
        copy_matrix<S>(ring.memory + step * S::STAGE_BYTES, matrix, place, step, ring.full + 8 * step);
    }
    wait_for_predecessor();
    do {
        for (int step = 0; step < place.steps; ++step) {
            const uint32_t target = ring.stage_memory(), barrier = ring.stage_full();
            if (ahead > 0) {
                ahead -= 1;
            } else {
                // In the ring's first turn this phase counts as over.
                barrier_wait(ring.stage_empty(), ring.turn ^ 1);
                barrier_expect(barrier, S::STAGE_BYTES);
                copy_matrix<S>(target, matrix, place, step, barrier);
            }
            copy_batch<S>(target + S::MATRIX_BYTES, batch, place, step, barrier);
            ring.next();
        }
    } while (walk_on<S, PARTS>(place, output));
}

/// Four steps of 16 columns out of one stage.
template <int BATCH>
__device__ __forceinline__ void multiply_stage(float (&sums)[BATCH / 2], uint32_t matrix, uint32_t batch, bool first) {
    const uint64_t a = operand_descriptor(matrix), b = operand_descriptor(batch);
#pragma unroll
    for (int step = 0; step < COLUMNS / 16; ++step)
        wgmma(sums, a + step * 2, b + step * 2, first && step == 0 ? 0 : 1);
}

/// A stage's place is free for the next copy: said to whoever copies into it.
template <typename S>
__device__ __forceinline__ void release(uint32_t barrier, const Place &place) {
    if (threadIdx.x % 128 != 0) return;
    if constexpr (S::PAIR) {
        barrier_arrive_at(barrier, place.rank_of(0));
        barrier_arrive_at(barrier, place.rank_of(1));
    } else {
        barrier_arrive(barrier);
    }
}

/// A warpgroup multiplies the stages of one part of K.
template <typename S>
__device__ __forceinline__ void consume(float (&sums)[S::BATCH / 2], Ring<S> &ring, const Place &place) {
    const uint32_t group = threadIdx.x / 128;
    uint32_t read = 0;
    for (int step = 0; step < place.steps; ++step) {
        const uint32_t source = ring.stage_memory();
        barrier_wait(ring.stage_full(), ring.turn);
        wgmma_hold(sums);
        wgmma_fence();
        multiply_stage<S::BATCH>(sums, source + group * MATRIX_BOX, source + S::MATRIX_BYTES, step == 0);
        wgmma_commit();
        wgmma_hold(sums);
        // The stage before is free once its products have ended; this stage's go on meanwhile.
        if (step > 0) {
            wgmma_wait<1>();
            release<S>(read, place);
        }
        read = ring.stage_empty();
        ring.next();
    }
    wgmma_wait<0>();
    wgmma_hold(sums);
    release<S>(read, place);
}

/// A warpgroup multiplies the parts of K in turn, and adds their sums in order. The place ends up at the last.
template <typename S>
__device__ __forceinline__ void consume_parts(float (&total)[S::BATCH / 2], Ring<S> &ring, Place &place,
                                              const Output &output) {
    // Set here, so that nothing defines them between the tensor cores' instructions, which would then run one by one.
    float sums[S::BATCH / 2];
#pragma unroll
    for (float &sum : sums) sum = 0.0f;
    for (;;) {
        consume<S>(sums, ring, place);
        add_part(total, sums, place.split);
        if (place.split + 1 == output.splits) return;
        walk_on<S, IN_TURN>(place, output);
    }
}

/// Waits for all pairs of a tile's parts and sees what they wrote: through a counter that the last to leave clears.
__device__ __forceinline__ void meet_in_memory(uint32_t *counter, uint32_t parts) {
    if (threadIdx.x != 0) return;
    uint32_t found;
    asm volatile("red.add.release.gpu.global.u32 [%0], 1;" ::"l"(counter) : "memory");
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
    } while (found < parts);
    if (atomicAdd(counter, 1) == 2 * parts - 1) atomicExch(counter, 0);
}

__device__ __forceinline__ float4 operator+(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

/// Adds the parts' sums in order: the block of part r takes every r-th share of the tile, of `COUNT`. The blocks read
/// each other's sums in their shared memory, or where pairs are apart in the device's.
template <typename S, Parts PARTS, int COUNT, class L>
__device__ __forceinline__ void add_parts(L &shared, const Output &output, const float (&sums)[S::BATCH / 2],
                                          uint8_t *scratch, const Place &place, Spot first) {
    constexpr int TILES = S::BATCH / 8, MINE = (TILES + COUNT - 1) / COUNT;
    /// Tiles whose sums are loaded at a time: more would take too many registers.
    constexpr int LOADED = 16 / COUNT;
    // All warps have read their last stage, and nobody copies into the ring any more: its memory is free.
    if (PARTS == BESIDE) meet<S::CONSUMERS>();
    const int share = TILES * S::CONSUMERS, block = place.tile * 2 * COUNT + place.pair;
    float4 *kept = PARTS == APART ? output.meeting.sums + size_t(block + 2 * place.split) * share + threadIdx.x
                                  : reinterpret_cast<float4 *>(scratch) + threadIdx.x;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
        kept[tile * S::CONSUMERS] =
            make_float4(sums[4 * tile], sums[4 * tile + 1], sums[4 * tile + 2], sums[4 * tile + 3]);
    // What is added to is on its way while the parts meet.
    float before[MINE][4], bias[4], weight[4];
    load_vector(output.bias, output, first.feature, bias);
    load_vector(output.after.weight, output, first.feature, weight);
#pragma unroll
    for (int i = 0; i < MINE; ++i) load_before(output, first.anew().tile(place.split + i * COUNT), before[i]);
    if constexpr (PARTS == APART) {
        __threadfence();
        meet<S::CONSUMERS>();
        meet_in_memory(output.meeting.counters + place.tile * 2 + place.pair, COUNT);
        meet<S::CONSUMERS>();
    } else {
        cluster_sync();
    }
    const uint32_t base = shared_address(scratch);
    const auto part_of = [&](int tile, int part) {
        const int at = tile * S::CONSUMERS + threadIdx.x;
        return PARTS == APART ? __ldcg(output.meeting.sums + size_t(block + 2 * part) * share + at)
                              : load_from_block(base + at * 16, place.pair * place.beside + part);
    };
#pragma unroll
    for (int loaded = 0; loaded < MINE; loaded += LOADED) {
        float4 parts[LOADED][COUNT];
#pragma unroll
        for (int i = 0; i < LOADED && loaded + i < MINE; ++i) {
            const int tile = place.split + (loaded + i) * COUNT;
#pragma unroll
            for (int part = 0; part < COUNT; ++part)
                if (tile < TILES) parts[i][part] = part_of(tile, part);
        }
#pragma unroll
        for (int i = 0; i < LOADED && loaded + i < MINE; ++i) {
            const int tile = place.split + (loaded + i) * COUNT;
            if (tile >= TILES) break;
            float4 total = parts[i][0];
#pragma unroll
            for (int part = 1; part < COUNT; ++part) total = total + parts[i][part];
            finish_tile(shared, output, first.anew().tile(tile), before[loaded + i],
                        {total.x, total.y, total.z, total.w}, bias, weight);
        }
    }
    store_squares(shared, output, place.feature, place.row, place.split, COUNT);
}

/// Adds the sums to the residual.
template <typename S, Parts PARTS, class L>
__device__ __forceinline__ void leave_sums(L &shared, const Output &output, const float (&sums)[S::BATCH / 2],
                                           uint8_t *scratch, const Place &place, Spot spot) {
    if constexpr (PARTS != IN_TURN) {
        // There are 1, 2 or 4 parts (`splits` in gemm.rs).
        if (output.splits == 2) return add_parts<S, PARTS, 2>(shared, output, sums, scratch, place, spot);
        if (output.splits == 4) return add_parts<S, PARTS, 4>(shared, output, sums, scratch, place, spot);
    }
    if constexpr (PARTS != APART) {
        // The squares of the tile before have been read.
        if (PARTS == IN_TURN) meet_group();
        store_sums<L, S::BATCH / 8>(shared, output, spot, sums, place.feature);
    }
}

/// The factors of the norms of heads. A head of 128 elements is two groups of 64 features: both of this block, or one of
/// each block of a cluster of two.
template <typename S, class L>
__device__ __forceinline__ void load_head_factors(L &shared, const Output &output) {
    const bool two = output.heads.head_dim == 128;
    for (int i = threadIdx.x; i < S::GROUPS * S::BATCH; i += S::CONSUMERS) {
        const int group = i / S::BATCH, local = i % S::BATCH;
        const float own = group_squares(shared, group, local);
        shared.heads[group][local] =
            S::GROUPS == 2 && two ? group_squares(shared, 0, local) + group_squares(shared, 1, local) : own;
    }
    if constexpr (S::GROUPS == 1) {
        if (two) {
            cluster_sync();
            float total = 0.0f;
            const bool has = threadIdx.x < S::BATCH;
            if (has) {
                const uint32_t place = shared_address(&shared.heads[0][threadIdx.x]);
                total = load_value_from_block(place, 0) + load_value_from_block(place, 1);
            }
            // The other block has read this one's share before it is written over, and before this one ends.
            cluster_meet();
            if (has) shared.heads[0][threadIdx.x] = total;
        }
    }
    for (int i = threadIdx.x; i < S::GROUPS * S::BATCH; i += S::CONSUMERS) {
        float &value = shared.heads[i / S::BATCH][i % S::BATCH];
        value = 1.0f / sqrtf(value / output.heads.head_dim + output.heads.eps);
    }
    meet<S::CONSUMERS>();
}

template <typename S, class L>
__device__ __forceinline__ void leave_heads(L &shared, const Output &output, float (&sums)[S::BATCH / 2], Spot spot) {
    constexpr int TILES = S::BATCH / 8;
    const HeadSpot at = head_spot(output, spot.feature);
    finish_heads<L, TILES>(shared, output, at, spot, sums);
    if (output.heads.q_norm != nullptr) {
        leave_head_squares<L, TILES>(shared, spot, sums);
        load_head_factors<S>(shared, output);
        norm_heads<L, TILES>(shared, output, at, spot, sums);
    }
    store_heads<L, TILES>(shared, output, at, spot, sums);
}

/// What is shared of a tile's rows is ready for a warpgroup, or free again: named barriers of it and the spare warps.
constexpr int ROWS_READY = 4, ROWS_FREE = 6;

template <typename S>
__device__ __forceinline__ void rows_arrive(int barrier) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(128 + S::HELPERS) : "memory");
}

template <typename S>
__device__ __forceinline__ void rows_wait(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(128 + S::HELPERS) : "memory");
}

/// Spare warps load what is shared of each tile's rows, while others multiply.
template <typename S, bool PLACES, Parts PARTS, class L>
__device__ __forceinline__ void load_tiles_rows(L &shared, const Output &output, Place place) {
    const auto walks_on = [&] {
        if (!walk_on<S, PARTS>(place, output)) return false;
        for (int group = 0; group < S::GROUPS; ++group) rows_wait<S>(ROWS_FREE + group);
        return true;
    };
    wait_for_predecessor();
    do {
        load_rows<PLACES>(shared, output, place.row, int(threadIdx.x) - S::CONSUMERS - 32, S::HELPERS);
        for (int group = 0; group < S::GROUPS; ++group) rows_arrive<S>(ROWS_READY + group);
    } while (walks_on());
}

/// Sums leave a block that has multiplied one part of K.
template <typename S, Epilogue EPILOGUE, Parts PARTS, class L>
__device__ __forceinline__ void leave(L &shared, const Output &output, float (&sums)[S::BATCH / 2], uint8_t *scratch,
                                      const Place &place) {
    constexpr int TILES = S::BATCH / 8;
    const Spot spot = spot_in(place.feature, place.row);
    pair_rows(sums);
    wait_for_predecessor();
    if constexpr (EPILOGUE != ADD && S::HELPERS > 0) rows_wait<S>(ROWS_READY + threadIdx.x / 128);
    if constexpr (EPILOGUE == VALUES) store_values<L, TILES>(shared, output, spot, sums);
    if constexpr (EPILOGUE == SILU_MUL) store_gated<L, TILES>(shared, output, spot, sums);
    if constexpr (EPILOGUE == ROPE) leave_heads<S>(shared, output, sums, spot);
    if constexpr (EPILOGUE == ADD) leave_sums<S, PARTS>(shared, output, sums, scratch, place, spot);
}

template <typename S, Epilogue EPILOGUE, Parts PARTS>
__device__ __forceinline__ void gemm(const CUtensorMap &matrix, const CUtensorMap &batch, const Output &output) {
    extern __shared__ uint8_t dynamic[];
    using Leaving = Shared<S::GROUPS * 4, S::BATCH>;
    __shared__ Leaving shared;
    __shared__ alignas(8) uint64_t barriers[2 * S::STAGES];
    const uint32_t start = (shared_address(dynamic) + 1023) & ~1023u, full = shared_address(barriers);
    Ring<S> ring = {start, full, full + 8 * S::STAGES};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::STAGES; ++stage) {
            barrier_init(ring.full + 8 * stage, 1);
            barrier_init(ring.empty + 8 * stage, S::GROUPS * (S::PAIR ? 2 : 1));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    // The other block of a pair copies into this one's ring and arrives at its barriers.
    if constexpr (S::PAIR) cluster_meet();
    launch_dependents();
    Place place = first_place<S, PARTS>(output);
    if (threadIdx.x >= S::CONSUMERS) {
        if constexpr (S::HELPERS > 0)
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(EPILOGUE == ADD ? 40 : 56));
        if (threadIdx.x == S::CONSUMERS) produce<S, PARTS>(ring, matrix, batch, place, output);
        if constexpr (EPILOGUE != ADD && S::HELPERS > 0) {
            if (threadIdx.x >= S::CONSUMERS + 32) load_tiles_rows<S, EPILOGUE == ROPE, PARTS>(shared, output, place);
        }
        return;
    }
    if constexpr (S::HELPERS > 0)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(EPILOGUE == ADD ? 232 : 224));
    if constexpr (EPILOGUE != ADD && S::HELPERS == 0) {
        wait_for_predecessor();
        load_rows<EPILOGUE == ROPE>(shared, output, place.row, threadIdx.x, S::CONSUMERS);
        meet<S::CONSUMERS>();
    }
    uint8_t *scratch = dynamic + (ring.memory - shared_address(dynamic));
    float sums[S::BATCH / 2];
    const auto walks_on = [&] {
        if (!walk_on<S, PARTS>(place, output)) return false;
        if constexpr (EPILOGUE != ADD) rows_arrive<S>(ROWS_FREE + threadIdx.x / 128);
        return true;
    };
    do {
        if constexpr (EPILOGUE == ADD && PARTS == IN_TURN) {
            consume_parts<S>(sums, ring, place, output);
        } else {
            consume<S>(sums, ring, place);
        }
        leave<S, EPILOGUE, PARTS>(shared, output, sums, scratch, place);
    } while (walks_on());
    // A block must not end while the other one may still arrive at its barriers, or reads its sums.
    if constexpr (S::PAIR || EPILOGUE == ADD) cluster_meet();
}

}  // namespace
#define GEMM_BODY(...) __VA_ARGS__
#else
// Only the names are needed: these kernels are never launched below compute capability 9.0.
#define GEMM_BODY(...)
#endif

// STAGES are as many as fit: for one block per multiprocessor of wide, two of thin. Beside the threads that multiply a
// wide block has a warpgroup of the producer's, from which registers move to the others; a thin or narrow one a warp.
#define WIDE(NAME, BATCH, STAGES, EPILOGUE, PARTS)                                                                     \
    extern "C" __global__ void __launch_bounds__(384, 1) NAME(const __grid_constant__ CUtensorMap matrix,              \
                                                              const __grid_constant__ CUtensorMap batch,               \
                                                              const __grid_constant__ Output output) {                 \
        GEMM_BODY(gemm<Shape<2, BATCH, STAGES, true>, EPILOGUE, PARTS>(matrix, batch, output);)                        \
    }
#define THIN(NAME, BATCH, STAGES, EPILOGUE)                                                                            \
    extern "C" __global__ void __launch_bounds__(160, 2) NAME(const __grid_constant__ CUtensorMap matrix,              \
                                                              const __grid_constant__ CUtensorMap batch,               \
                                                              const __grid_constant__ Output output) {                 \
        GEMM_BODY(gemm<Shape<1, BATCH, STAGES, false>, EPILOGUE, BESIDE>(matrix, batch, output);)                      \
    }
#define NARROW(NAME, BATCH, STAGES, EPILOGUE)                                                                          \
    extern "C" __global__ void __launch_bounds__(160, 1) NAME(const __grid_constant__ CUtensorMap matrix,              \
                                                              const __grid_constant__ CUtensorMap batch,               \
                                                              const __grid_constant__ Output output) {                 \
        GEMM_BODY(gemm<Shape<1, BATCH, STAGES, true>, EPILOGUE, APART>(matrix, batch, output);)                        \
    }
#define SMALL(NAME, EPILOGUE)                                                                                          \
    THIN(gemm_thin_8_##NAME, 8, 11, EPILOGUE)                                                                          \
    THIN(gemm_thin_16_##NAME, 16, 10, EPILOGUE)                                                                        \
    THIN(gemm_thin_32_##NAME, 32, 8, EPILOGUE)                                                                         \
    THIN(gemm_thin_64_##NAME, 64, 6, EPILOGUE)                                                                         \
    WIDE(gemm_wide_64_##NAME, 64, 8, EPILOGUE, BESIDE)

// Of the tiles of more rows those that are the best ones somewhere (TUNING.md).
SMALL(values, VALUES)
WIDE(gemm_walk_128_values, 128, 6, VALUES, IN_TURN)
WIDE(gemm_walk_192_values, 192, 5, VALUES, IN_TURN)
WIDE(gemm_walk_256_values, 256, 4, VALUES, IN_TURN)
SMALL(rope, ROPE)
WIDE(gemm_walk_128_rope, 128, 6, ROPE, IN_TURN)
WIDE(gemm_walk_192_rope, 192, 5, ROPE, IN_TURN)
SMALL(silu_mul, SILU_MUL)
WIDE(gemm_wide_128_silu_mul, 128, 6, SILU_MUL, BESIDE)
WIDE(gemm_wide_192_silu_mul, 192, 5, SILU_MUL, BESIDE)
WIDE(gemm_walk_256_silu_mul, 256, 4, SILU_MUL, IN_TURN)
SMALL(add, ADD)
WIDE(gemm_apart_128_add, 128, 6, ADD, APART)
WIDE(gemm_apart_192_add, 192, 5, ADD, APART)
NARROW(gemm_narrow_128_add, 128, 8, ADD)
NARROW(gemm_narrow_192_add, 192, 6, ADD)
WIDE(gemm_walk_128_add, 128, 6, ADD, IN_TURN)
WIDE(gemm_walk_192_add, 192, 5, ADD, IN_TURN)
