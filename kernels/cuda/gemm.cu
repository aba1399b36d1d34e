// Matrix products on Hopper: the copy engine fills a ring of stages, warpgroups multiply out of it.
//
// gemm_wide: 128 features by 64 to 256 rows of the batch; two blocks with neighbouring features share the rows of the
// batch, of which each fetches half for both. gemm_double: as wide, with 128 rows and fewer stages, so that a
// multiprocessor has two blocks and one multiplies while the other stores. gemm_thin: 64 features by 8 to 64 rows. Where
// K has parts, the blocks of a cluster take one each and add their sums in order through each other's shared memory; at
// many rows one block takes all parts in turn and keeps the total in registers (gemm_totals). All compute the same
// chains (see gemm.cuh) and so the same bytes. A producer asks for weights before its predecessor's end, which keeps
// memory busy between the small kernels of a decode.
//
// Bytes: matrix once per batch tile, batch rows once per pair of feature tiles. Operations: 2 * rows * features * columns.
#include <cuda.h>

#include "gemm.cuh"

#if defined(MILLRACE_SM90)
namespace {

constexpr int COLUMNS = 64;  // of K in a stage: 128 bytes, one swizzled row
constexpr int ROW_BYTES = COLUMNS * 2;
constexpr int GROUP_FEATURES = 64;  // of one warpgroup
constexpr int MATRIX_BOX = GROUP_FEATURES * ROW_BYTES;
/// Batch tiles that are computed beside each other: with as many feature tiles they share what the cache holds.
constexpr int SUPER_TILES = 8;

/// How parts of K are added.
enum Parts {
    /// By blocks of a cluster, a part each. With one part, by nobody.
    BESIDE,
    /// In registers, in turn.
    TOTALS,
};

/// The shape of a kernel: warpgroups that multiply, rows of the batch, stages, whether blocks work in pairs, and how many
/// blocks a multiprocessor has.
template <int GROUPS_, int BATCH_, int STAGES_, bool PAIR_, int BLOCKS_>
struct Shape {
    static constexpr int GROUPS = GROUPS_, BATCH = BATCH_, STAGES = STAGES_, BLOCKS = BLOCKS_;
    static constexpr bool PAIR = PAIR_;
    static constexpr int FEATURES = GROUPS * GROUP_FEATURES;
    static constexpr int MATRIX_BYTES = GROUPS * MATRIX_BOX;
    static constexpr int STAGE_BYTES = MATRIX_BYTES + BATCH * ROW_BYTES;
    static constexpr int BOX_ROWS = BATCH < 64 ? 8 : 32;
    static constexpr int CONSUMERS = GROUPS * 128;
    /// Threads that neither copy nor multiply: where registers move between warpgroups, three warps of the producer's.
    static constexpr int HELPERS = GROUPS == 2 && BLOCKS == 1 ? 96 : 0;
};

/// Where a block works.
struct Place {
    int feature, row, begin, steps, split, splits, pair;
    uint32_t rank;
};

template <typename S, Parts PARTS>
__device__ __forceinline__ Place place_of(const Output &output) {
    Place place;
    place.splits = PARTS == BESIDE ? output.splits : 1;
    const int cluster = place.splits * (S::PAIR ? 2 : 1), tile = blockIdx.x / cluster;
    place.rank = blockIdx.x % cluster;
    place.split = place.rank % place.splits;
    place.pair = place.rank / place.splits;
    // Tiles in groups of 8 batch tiles, all features of a group before the next.
    const int group = tile / (SUPER_TILES * output.feature_tiles), first = group * SUPER_TILES;
    const int height = min(SUPER_TILES, output.batch_tiles - first);
    const int inside = tile - group * SUPER_TILES * output.feature_tiles;
    place.row = (first + inside % height) * S::BATCH;
    place.feature = (inside / height * (S::PAIR ? 2 : 1) + place.pair) * S::FEATURES;
    if (PARTS != BESIDE) {
        place.begin = 0;
        place.steps = (output.columns + COLUMNS - 1) / COLUMNS;
    } else {
        place.begin = split_start(output, place.split);
        place.steps = split_start(output, place.split + 1) - place.begin;
    }
    return place;
}

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
        const uint16_t mask = uint16_t(1u << place.split | 1u << (place.split + place.splits));
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

/// One thread fills the ring.
template <typename S>
__device__ __forceinline__ void produce(uint32_t ring, uint32_t full, uint32_t empty, const CUtensorMap &matrix,
                                        const CUtensorMap &batch, const Place &place) {
    const int ahead = min(place.steps, S::STAGES);
    for (int step = 0; step < ahead; ++step) {
        barrier_expect(full + 8 * step, S::STAGE_BYTES);
        copy_matrix<S>(ring + step * S::STAGE_BYTES, matrix, place, step, full + 8 * step);
    }
    wait_for_predecessor();
    for (int step = 0; step < place.steps; ++step) {
        const int stage = step % S::STAGES;
        const uint32_t target = ring + stage * S::STAGE_BYTES, barrier = full + 8 * stage;
        if (step >= S::STAGES) {
            barrier_wait(empty + 8 * stage, (step / S::STAGES - 1) % 2);
            barrier_expect(barrier, S::STAGE_BYTES);
            copy_matrix<S>(target, matrix, place, step, barrier);
        }
        copy_batch<S>(target + S::MATRIX_BYTES, batch, place, step, barrier);
    }
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
        barrier_arrive_at(barrier, place.split);
        barrier_arrive_at(barrier, place.split + place.splits);
    } else {
        barrier_arrive(barrier);
    }
}

/// A warpgroup multiplies the ring's stages. Where parts of K are taken in turn, `part_end` gets each part's sums.
template <typename S, bool IN_TURN, class F>
__device__ __forceinline__ void consume(float (&sums)[S::BATCH / 2], uint32_t ring, uint32_t full, const Place &place,
                                        const Output &output, F part_end) {
    const uint32_t empty = full + 8 * S::STAGES, group = threadIdx.x / 128;
    int part = 0, begin = 0, end = IN_TURN ? split_start(output, 1) : place.steps;
    for (int step = 0; step < place.steps; ++step) {
        const int stage = step % S::STAGES;
        const uint32_t source = ring + stage * S::STAGE_BYTES;
        barrier_wait(full + 8 * stage, step / S::STAGES % 2);
        wgmma_hold(sums);
        wgmma_fence();
        multiply_stage<S::BATCH>(sums, source + group * MATRIX_BOX, source + S::MATRIX_BYTES, step == begin);
        wgmma_commit();
        wgmma_hold(sums);
        // The stage before is free once its products have ended; this stage's go on meanwhile.
        if (step > 0) {
            wgmma_wait<1>();
            release<S>(empty + 8 * ((step - 1) % S::STAGES), place);
        }
        if constexpr (IN_TURN) {
            if (step + 1 == end) {
                wgmma_wait<0>();
                wgmma_hold(sums);
                part_end(part);
                part += 1;
                begin = end;
                end = split_start(output, part + 1);
            }
        }
    }
    wgmma_wait<0>();
    wgmma_hold(sums);
}

/// Adds the parts' sums in order: the block of part r takes every r-th share of the tile. There are two parts or more.
template <typename S, class L>
__device__ __forceinline__ void add_parts(L &shared, const Output &output, const float (&sums)[S::BATCH / 2],
                                          uint8_t *scratch, const Place &place, Spot first) {
    constexpr int TILES = S::BATCH / 8, MINE = (TILES + 1) / 2;
    // What is added to is on its way while the parts meet.
    float before[MINE][4], bias[2], weight[2];
    load_bias(output, first.feature, bias);
    load_norm(output, first.feature, weight);
#pragma unroll
    for (int i = 0; i < MINE; ++i) load_before(output, first.anew().tile(place.split + i * place.splits), before[i]);
    // All warps have read their last stage, and nobody copies into the ring any more: its memory is free.
    meet<S::CONSUMERS>();
    auto *mine = reinterpret_cast<float4 *>(scratch);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
        mine[tile * S::CONSUMERS + threadIdx.x] =
            make_float4(sums[4 * tile], sums[4 * tile + 1], sums[4 * tile + 2], sums[4 * tile + 3]);
    cluster_sync();
    const uint32_t base = shared_address(scratch);
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
        const int tile = place.split + i * place.splits;
        if (tile >= TILES) break;
        float (&total)[4] = before[i];
        for (int part = 0; part < place.splits; ++part) {
            const float4 v = load_from_block(base + (tile * S::CONSUMERS + threadIdx.x) * 16,
                                             place.pair * place.splits + part);
            total[0] += v.x;
            total[1] += v.y;
            total[2] += v.z;
            total[3] += v.w;
        }
        finish_tile(shared, output, first.anew().tile(tile), total, bias, weight);
    }
    store_squares(shared, output, place.feature, place.row, place.split, place.splits);
    // A block must not end while another one reads its sums.
    cluster_meet();
}

/// Adds the sums to the residual.
template <typename S, Parts PARTS, class L>
__device__ __forceinline__ void leave_sums(L &shared, const Output &output, float (&sums)[S::BATCH / 2],
                                           uint8_t *scratch, const Place &place, Spot spot) {
    // Tiles of 256 rows leave no registers for parts; the host does not choose them where K has several.
    if constexpr (PARTS == BESIDE && S::BATCH < 256) {
        if (place.splits > 1) {
            add_parts<S>(shared, output, sums, scratch, place, spot);
            return;
        }
    }
    store_sums<PARTS == TOTALS, L, S::BATCH / 8>(shared, output, spot, sums, place.feature);
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

template <typename S, Epilogue EPILOGUE, Parts PARTS>
__device__ __forceinline__ void gemm(const CUtensorMap &matrix, const CUtensorMap &batch, const Output &output) {
    extern __shared__ uint8_t dynamic[];
    using Leaving = Shared<S::GROUPS * 4, S::BATCH, S::GROUPS == 2 && S::BLOCKS == 2 ? 2 : 4>;
    __shared__ Leaving shared;
    __shared__ alignas(8) uint64_t barriers[2 * S::STAGES];
    const uint32_t ring = (shared_address(dynamic) + 1023) & ~1023u;
    const uint32_t full = shared_address(barriers), empty = full + 8 * S::STAGES;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < S::STAGES; ++stage) {
            barrier_init(full + 8 * stage, 1);
            barrier_init(empty + 8 * stage, S::GROUPS * (S::PAIR ? 2 : 1));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    // The other block of a pair copies into this one's ring and arrives at its barriers.
    if constexpr (S::PAIR) cluster_meet();
    launch_dependents();
    const Place place = place_of<S, PARTS>(output);
    if (threadIdx.x >= S::CONSUMERS) {
        if constexpr (S::HELPERS > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == S::CONSUMERS) produce<S>(ring, full, empty, matrix, batch, place);
        const int helper = int(threadIdx.x) - S::CONSUMERS - 32;
        if (EPILOGUE != ADD && S::HELPERS > 0 && helper >= 0) {
            wait_for_predecessor();
            load_rows<EPILOGUE == ROPE>(shared, output, place.row, helper, S::HELPERS);
            asm volatile("bar.arrive 2, %0;" ::"n"(S::CONSUMERS + S::HELPERS) : "memory");
        }
        return;
    }
    if constexpr (S::HELPERS > 0) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const Spot spot = {place.feature + int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4,
                       place.row + int(threadIdx.x) % 4 * 2, place.row};
    if constexpr (EPILOGUE != ADD && S::HELPERS == 0) {
        wait_for_predecessor();
        load_rows<EPILOGUE == ROPE>(shared, output, place.row, threadIdx.x, S::CONSUMERS);
        meet<S::CONSUMERS>();
    }
    constexpr int TILES = S::BATCH / 8;
    float sums[S::BATCH / 2];
    float totals[PARTS == TOTALS ? S::BATCH / 2 : 4];
    consume<S, PARTS != BESIDE>(sums, ring, full, place, output, [&](int part) {
        wait_for_predecessor();
        if constexpr (PARTS == TOTALS) {
            if (part == 0) {
#pragma unroll
                for (int i = 0; i < S::BATCH / 2; ++i) totals[i] = sums[i];
                add_before<TILES>(output, spot, totals);
            } else {
#pragma unroll
                for (int i = 0; i < S::BATCH / 2; ++i) totals[i] += sums[i];
            }
        }
    });
    wait_for_predecessor();
    if constexpr (EPILOGUE != ADD && S::HELPERS > 0)
        asm volatile("bar.sync 2, %0;" ::"n"(S::CONSUMERS + S::HELPERS) : "memory");
    uint8_t *scratch = dynamic + (ring - shared_address(dynamic));
    if constexpr (EPILOGUE == VALUES) store_values<Leaving, TILES>(shared, output, spot, sums);
    if constexpr (EPILOGUE == SILU_MUL) store_gated<Leaving, TILES>(shared, output, spot, sums);
    if constexpr (EPILOGUE == ROPE) leave_heads<S>(shared, output, sums, spot);
    if constexpr (EPILOGUE == ADD) {
        if constexpr (PARTS == TOTALS) {
            leave_sums<S, PARTS>(shared, output, totals, scratch, place, spot);
        } else {
            leave_sums<S, PARTS>(shared, output, sums, scratch, place, spot);
            if (place.splits > 1) return;
        }
    }
    // A block must not end while the other one may still arrive at its barriers.
    if constexpr (S::PAIR) cluster_meet();
}

}  // namespace
#define GEMM_BODY(...) __VA_ARGS__
#else
// Only the names are needed: these kernels are never launched below compute capability 9.0.
#define GEMM_BODY(...)
#endif

// STAGES are as many as fit: BLOCKS per multiprocessor for wide, two for thin. A warpgroup of the producer's, where
// registers move from it to the others; else a warp.
#define WIDE(NAME, BATCH, STAGES, BLOCKS, EPILOGUE, PARTS)                                                             \
    extern "C" __global__ void __launch_bounds__(BLOCKS == 1 ? 384 : 288, BLOCKS)                                      \
        NAME(const __grid_constant__ CUtensorMap matrix, const __grid_constant__ CUtensorMap batch,                    \
             const __grid_constant__ Output output) {                                                                  \
        GEMM_BODY(gemm<Shape<2, BATCH, STAGES, true, BLOCKS>, EPILOGUE, PARTS>(matrix, batch, output);)                \
    }
#define THIN(NAME, BATCH, STAGES, EPILOGUE)                                                                            \
    extern "C" __global__ void __launch_bounds__(160, 2) NAME(const __grid_constant__ CUtensorMap matrix,              \
                                                              const __grid_constant__ CUtensorMap batch,               \
                                                              const __grid_constant__ Output output) {                 \
        GEMM_BODY(gemm<Shape<1, BATCH, STAGES, false, 2>, EPILOGUE, BESIDE>(matrix, batch, output);)                   \
    }
#define ALL_SIZES(NAME, EPILOGUE)                                                                                      \
    THIN(gemm_thin_8_##NAME, 8, 11, EPILOGUE)                                                                          \
    THIN(gemm_thin_16_##NAME, 16, 10, EPILOGUE)                                                                        \
    THIN(gemm_thin_32_##NAME, 32, 8, EPILOGUE)                                                                         \
    THIN(gemm_thin_64_##NAME, 64, 6, EPILOGUE)                                                                         \
    WIDE(gemm_wide_64_##NAME, 64, 8, 1, EPILOGUE, BESIDE)                                                              \
    WIDE(gemm_wide_128_##NAME, 128, 6, 1, EPILOGUE, BESIDE)                                                            \
    WIDE(gemm_wide_192_##NAME, 192, 5, 1, EPILOGUE, BESIDE)                                                            \
    WIDE(gemm_wide_256_##NAME, 256, 4, 1, EPILOGUE, BESIDE)

ALL_SIZES(values, VALUES)
ALL_SIZES(silu_mul, SILU_MUL)
ALL_SIZES(rope, ROPE)
ALL_SIZES(add, ADD)
WIDE(gemm_double_128_values, 128, 3, 2, VALUES, BESIDE)
WIDE(gemm_double_128_silu_mul, 128, 3, 2, SILU_MUL, BESIDE)
WIDE(gemm_double_128_rope, 128, 3, 2, ROPE, BESIDE)
WIDE(gemm_totals_128_add, 128, 6, 1, ADD, TOTALS)
WIDE(gemm_totals_192_add, 192, 5, 1, ADD, TOTALS)
