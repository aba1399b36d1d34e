// Matrix products on Hopper: the copy engine fills a ring of stages, warpgroups multiply out of it.
//
// gemm_wide: 128 features by 64 to 256 rows of the batch; two blocks with neighbouring features share the rows of the
// batch, of which each fetches half for both. gemm_thin: 64 features by 8 to 64 rows. Where K has parts, the blocks of a
// cluster take one each and add their sums in order through each other's shared memory; at many rows one block takes
// all parts in turn. All compute the same chains (see gemm.cuh) and so the same bytes. A producer asks for weights
// before its predecessor's end, which keeps memory busy between the small kernels of a decode.
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

/// The shape of a kernel: warpgroups that multiply, rows of the batch, stages, whether blocks work in pairs.
template <int GROUPS_, int BATCH_, int STAGES_, bool PAIR_>
struct Shape {
    static constexpr int GROUPS = GROUPS_, BATCH = BATCH_, STAGES = STAGES_;
    static constexpr bool PAIR = PAIR_;
    static constexpr int FEATURES = GROUPS * GROUP_FEATURES;
    static constexpr int MATRIX_BYTES = GROUPS * MATRIX_BOX;
    static constexpr int STAGE_BYTES = MATRIX_BYTES + BATCH * ROW_BYTES;
    static constexpr int BOX_ROWS = BATCH < 64 ? 8 : 32;
    static constexpr int CONSUMERS = GROUPS * 128;
};

/// Where a block works.
struct Place {
    int feature, row, begin, steps, split, splits, pair;
    uint32_t rank;
};

template <typename S, bool TOTALS>
__device__ __forceinline__ Place place_of(const Output &output) {
    Place place;
    place.splits = TOTALS ? 1 : output.splits;
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
    if (TOTALS) {
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

/// A warpgroup multiplies the ring's stages; the result is in `totals` where parts of K are taken in turn.
template <typename S, bool TOTALS, int COUNT>
__device__ __forceinline__ void consume(float (&sums)[S::BATCH / 2], float (&totals)[COUNT], uint32_t ring,
                                        uint32_t full, const Place &place, const Output &output) {
    const uint32_t empty = full + 8 * S::STAGES, group = threadIdx.x / 128;
    int split = 0, begin = 0, end = split_start(output, 1);
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
        if constexpr (TOTALS) {
            if (step + 1 == end) {
                wgmma_wait<0>();
                wgmma_hold(sums);
#pragma unroll
                for (int i = 0; i < COUNT; ++i) totals[i] = split == 0 ? sums[i] : totals[i] + sums[i];
                split += 1;
                begin = end;
                end = split_start(output, split + 1);
            }
        }
    }
    wgmma_wait<0>();
    wgmma_hold(sums);
}

/// Adds the parts' sums in order: the block of part r takes every r-th share of the tile. There are two parts or more.
template <typename S>
__device__ __forceinline__ void add_parts(const Output &output, const float (&sums)[S::BATCH / 2], uint8_t *scratch,
                                          const Place &place, Spot spot) {
    constexpr int TILES = S::BATCH / 8, MINE = (TILES + 1) / 2;
    // What is added to is on its way while the parts meet.
    float before[MINE][4], bias[2];
    load_bias(output, spot.feature, bias);
#pragma unroll
    for (int i = 0; i < MINE; ++i) load_before(output, {spot.feature, spot.row + 8 * (place.split + i * place.splits)}, before[i]);
    // All warps have read their last stage, and nobody copies into the ring any more: its memory is free.
    asm volatile("bar.sync 1, %0;" ::"n"(S::CONSUMERS) : "memory");
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
        float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int part = 0; part < place.splits; ++part) {
            uint32_t remote;
            float4 v;
            asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                         : "=r"(remote)
                         : "r"(base + (tile * S::CONSUMERS + threadIdx.x) * 16), "r"(place.pair * place.splits + part));
            asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                         : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                         : "r"(remote)
                         : "memory");
            total = part == 0 ? v : make_float4(total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w);
        }
        const float parts[4] = {total.x, total.y, total.z, total.w};
        store_values(output, {spot.feature, spot.row + 8 * tile}, before[i], parts, bias);
    }
    // A block must not end while another one reads its sums.
    cluster_meet();
}

template <typename S, Epilogue EPILOGUE, bool TOTALS>
__device__ __forceinline__ void gemm(const CUtensorMap &matrix, const CUtensorMap &batch, const Output &output) {
    extern __shared__ uint8_t dynamic[];
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
    const Place place = place_of<S, TOTALS>(output);
    if (threadIdx.x >= S::CONSUMERS) {
        if constexpr (S::GROUPS == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == S::CONSUMERS) produce<S>(ring, full, empty, matrix, batch, place);
        return;
    }
    if constexpr (S::GROUPS == 2) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    float sums[S::BATCH / 2];
    float totals[TOTALS ? S::BATCH / 2 : 1];
    consume<S, TOTALS>(sums, totals, ring, full, place, output);
    wait_for_predecessor();
    const Spot spot = {place.feature + int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4,
                       place.row + int(threadIdx.x) % 4 * 2};
    // Tiles of 256 rows leave no registers for parts; the host does not choose them where K has several.
    if constexpr (EPILOGUE == ADD && !TOTALS && S::BATCH < 256) {
        if (place.splits > 1) {
            add_parts<S>(output, sums, dynamic + (ring - shared_address(dynamic)), place, spot);
            return;
        }
    }
    if constexpr (TOTALS) {
        store_sums<EPILOGUE, S::BATCH / 8>(output, spot, totals);
    } else {
        store_sums<EPILOGUE, S::BATCH / 8>(output, spot, sums);
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

// STAGES are as many as fit: one block per multiprocessor for wide, two for thin.
#define WIDE(NAME, BATCH, STAGES, EPILOGUE, TOTALS)                                                                    \
    extern "C" __global__ void __launch_bounds__(384, 1) NAME(const __grid_constant__ CUtensorMap matrix,              \
                                                              const __grid_constant__ CUtensorMap batch,               \
                                                              const __grid_constant__ Output output) {                 \
        GEMM_BODY(gemm<Shape<2, BATCH, STAGES, true>, EPILOGUE, TOTALS>(matrix, batch, output);)                       \
    }
#define THIN(NAME, BATCH, STAGES, EPILOGUE)                                                                            \
    extern "C" __global__ void __launch_bounds__(160, 2) NAME(const __grid_constant__ CUtensorMap matrix,              \
                                                              const __grid_constant__ CUtensorMap batch,               \
                                                              const __grid_constant__ Output output) {                 \
        GEMM_BODY(gemm<Shape<1, BATCH, STAGES, false>, EPILOGUE, false>(matrix, batch, output);)                       \
    }

WIDE(gemm_wide_64_values, 64, 8, VALUES, false)
WIDE(gemm_wide_128_values, 128, 6, VALUES, false)
WIDE(gemm_wide_192_values, 192, 5, VALUES, false)
WIDE(gemm_wide_256_values, 256, 4, VALUES, false)
WIDE(gemm_wide_64_silu_mul, 64, 8, SILU_MUL, false)
WIDE(gemm_wide_128_silu_mul, 128, 6, SILU_MUL, false)
WIDE(gemm_wide_192_silu_mul, 192, 5, SILU_MUL, false)
WIDE(gemm_wide_256_silu_mul, 256, 4, SILU_MUL, false)
WIDE(gemm_wide_64_add, 64, 8, ADD, false)
WIDE(gemm_wide_128_add, 128, 6, ADD, false)
WIDE(gemm_wide_192_add, 192, 5, ADD, false)
WIDE(gemm_wide_256_add, 256, 4, ADD, false)
WIDE(gemm_totals_128_add, 128, 6, ADD, true)
WIDE(gemm_totals_192_add, 192, 5, ADD, true)
THIN(gemm_thin_8_values, 8, 11, VALUES)
THIN(gemm_thin_16_values, 16, 10, VALUES)
THIN(gemm_thin_32_values, 32, 8, VALUES)
THIN(gemm_thin_64_values, 64, 6, VALUES)
THIN(gemm_thin_8_silu_mul, 8, 11, SILU_MUL)
THIN(gemm_thin_16_silu_mul, 16, 10, SILU_MUL)
THIN(gemm_thin_32_silu_mul, 32, 8, SILU_MUL)
THIN(gemm_thin_64_silu_mul, 64, 6, SILU_MUL)
THIN(gemm_thin_8_add, 8, 11, ADD)
THIN(gemm_thin_16_add, 16, 10, ADD)
THIN(gemm_thin_32_add, 32, 8, ADD)
THIN(gemm_thin_64_add, 64, 6, ADD)
