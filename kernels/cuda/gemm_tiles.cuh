// Shapes of Hopper's matrix products: the ring of stages that a block copies into, and which tiles and parts of K it
// takes, in which order (see gemm.cu for the kinds).
#pragma once

#include "gemm.cuh"

#if defined(MILLRACE_SM90)
constexpr int COLUMNS = 64;  // of K in a stage: 128 bytes, one swizzled row
constexpr int ROW_BYTES = COLUMNS * 2;
constexpr int GROUP_FEATURES = 64;  // of one warpgroup
constexpr int MATRIX_BOX = GROUP_FEATURES * ROW_BYTES;
/// Batch tiles that are computed beside each other: with as many feature tiles they share what the cache holds.
constexpr int SUPER_TILES = 8;

/// Who takes the parts of K.
enum Parts {
    /// The blocks of a cluster, one each. With one part, there is nothing to meet for.
    BESIDE,
    /// Pairs of blocks anywhere, one each. They all must run at once.
    APART,
    /// One pair all of them in turn, tile after tile.
    IN_TURN,
};

/// The shape of a kernel: warpgroups that multiply, rows of the batch, stages, and whether blocks work in pairs.
template <int GROUPS_, int BATCH_, int STAGES_, bool PAIR_>
struct Shape {
    static constexpr int GROUPS = GROUPS_, BATCH = BATCH_, STAGES = STAGES_;
    static constexpr bool PAIR = PAIR_;
    static constexpr int FEATURES = GROUPS * GROUP_FEATURES;
    static constexpr int MATRIX_BYTES = GROUPS * MATRIX_BOX;
    static constexpr int STAGE_BYTES = MATRIX_BYTES + BATCH * ROW_BYTES;
    static constexpr int BOX_ROWS = BATCH < 64 ? 8 : 32;
    static constexpr int CONSUMERS = GROUPS * 128;
    /// Threads that neither copy nor multiply: where registers move between warpgroups, three warps of the producer's.
    static constexpr int HELPERS = GROUPS == 2 ? 96 : 0;
};

/// The ring of stages, and the stage where a thread stands.
template <typename S>
struct Ring {
    uint32_t memory, full, empty;
    int stage = 0, turn = 0;

    __device__ __forceinline__ uint32_t stage_memory() const { return memory + stage * S::STAGE_BYTES; }
    __device__ __forceinline__ uint32_t stage_full() const { return full + 8 * stage; }
    __device__ __forceinline__ uint32_t stage_empty() const { return empty + 8 * stage; }
    __device__ __forceinline__ void next() {
        stage += 1;
        if (stage == S::STAGES) stage = 0, turn ^= 1;
    }
};

/// Where a block works.
struct Place {
    /// Of those that a grid has, in the order in which they are taken.
    int tile;
    int feature, row, begin, steps, split;
    /// Parts of K that the blocks of a cluster take, and which block of a pair this is.
    int beside, pair;

    /// The cluster's block of the same part in a pair.
    __device__ __forceinline__ uint32_t rank_of(int block) const { return split % beside + block * beside; }
};

/// Fills in where a tile lies. Tiles come in groups of 8 batch tiles, all features of a group before the next.
template <typename S>
__device__ __forceinline__ void locate(Place &place, const Output &output) {
    const int group = place.tile / (SUPER_TILES * output.feature_tiles), first = group * SUPER_TILES;
    const int height = min(SUPER_TILES, output.batch_tiles - first);
    const int inside = place.tile - group * SUPER_TILES * output.feature_tiles;
    place.row = (first + inside % height) * S::BATCH;
    place.feature = (inside / height * (S::PAIR ? 2 : 1) + place.pair) * S::FEATURES;
    place.begin = split_start(output, place.split);
    place.steps = split_start(output, place.split + 1) - place.begin;
}

/// Where a block works first.
template <typename S, Parts PARTS>
__device__ __forceinline__ Place first_place(const Output &output) {
    Place place;
    place.beside = PARTS == BESIDE ? output.splits : 1;
    const int cluster = place.beside * (S::PAIR ? 2 : 1), rank = blockIdx.x % cluster, index = blockIdx.x / cluster;
    place.tile = PARTS == APART ? index / output.splits : index;
    place.split = PARTS == APART ? index % output.splits : rank % place.beside;
    place.pair = rank / place.beside;
    locate<S>(place, output);
    return place;
}

/// Goes on to the next part of K or the next tile of a pair that walks, if there is one.
template <typename S, Parts PARTS>
__device__ __forceinline__ bool walk_on(Place &place, const Output &output) {
    if constexpr (PARTS != IN_TURN) return false;
    place.split += 1;
    if (place.split == output.splits) place.split = 0, place.tile += gridDim.x / 2;
    if (place.tile >= output.batch_tiles * output.feature_tiles) return false;
    locate<S>(place, output);
    return true;
}
#endif
