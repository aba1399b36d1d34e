// Matrix products with mma.sync, for compute capability 8.0 and up, and as the check of the Hopper kernels.
//
// 64 features by 64 rows of the batch per block, two stages of 64 columns; the same chains over K as gemm.cu. Written
// for correctness: Ampere runs it, Hopper does not need it.
#include "gemm.cuh"

namespace {

constexpr int TILE = 64;
constexpr int COLUMNS = 64;
/// Elements of a row in shared memory: 16 bytes more than it holds, so that 8 rows fall into different banks.
constexpr int STRIDE = COLUMNS + 8;
constexpr int THREADS = 128;

__device__ __forceinline__ uint32_t shared_pointer(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Copies 64 rows of 64 columns; what lies outside of the operand becomes zero.
__device__ __forceinline__ void copy_tile(__nv_bfloat16 (*target)[STRIDE], const __nv_bfloat16 *source, int stride,
                                          int first_row, int rows, int first_column, int columns) {
    for (int i = threadIdx.x; i < TILE * COLUMNS / 8; i += THREADS) {
        const int row = i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
        const bool inside = first_row + row < rows && first_column + column < columns;
        const int valid = inside ? min(8, columns - first_column - column) * 2 : 0;
        const __nv_bfloat16 *from = inside ? source + size_t(first_row + row) * stride + first_column + column : source;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_pointer(&target[row][column])),
                     "l"(from), "r"(valid)
                     : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
}

__device__ __forceinline__ void load_fragment(uint32_t (&fragment)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_pointer(row)));
}

__device__ __forceinline__ void multiply(float *d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <Epilogue EPILOGUE>
__device__ __forceinline__ void gemm_mma(const __nv_bfloat16 *matrix, int matrix_stride, const __nv_bfloat16 *batch,
                                         int batch_stride, const Output &output) {
    __shared__ alignas(16) __nv_bfloat16 matrix_tile[2][TILE][STRIDE];
    __shared__ alignas(16) __nv_bfloat16 batch_tile[2][TILE][STRIDE];
    launch_dependents();
    wait_for_predecessor();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int feature = blockIdx.y * TILE, row = blockIdx.x * TILE;
    const int steps = (output.columns + COLUMNS - 1) / COLUMNS;
    const Spot spot = spot_in(feature, row);
    using Leaving = Shared<THREADS / 32, TILE>;
    __shared__ Leaving shared;
    load_rows<false>(shared, output, row, threadIdx.x, THREADS);
    __syncthreads();
    auto copy = [&](int step) {
        copy_tile(matrix_tile[step % 2], matrix, matrix_stride, feature, output.features, step * COLUMNS, output.columns);
        copy_tile(batch_tile[step % 2], batch, batch_stride, row, output.rows, step * COLUMNS, output.columns);
    };
    float sums[TILE / 2], total[TILE / 2];
    copy(0);
    int split = 0, begin = 0, end = split_start(output, 1);
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) {
            copy(step + 1);
            asm volatile("cp.async.wait_group 2;" ::: "memory");
        } else {
            asm volatile("cp.async.wait_group 0;" ::: "memory");
        }
        __syncthreads();
        if (step == begin)
            for (float &sum : sums) sum = 0.0f;
#pragma unroll
        for (int k = 0; k < COLUMNS; k += 16) {
            uint32_t a[4];
            load_fragment(a, &matrix_tile[step % 2][warp * 16 + lane % 16][k + lane / 16 * 8]);
#pragma unroll
            for (int pair = 0; pair < TILE / 16; ++pair) {
                uint32_t b[4];
                load_fragment(b, &batch_tile[step % 2][pair * 16 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
                multiply(sums + 8 * pair, a, b[0], b[1]);
                multiply(sums + 8 * pair + 4, a, b[2], b[3]);
            }
        }
        __syncthreads();
        if (step + 1 == end) {
            add_part(total, sums, split);
            split += 1;
            begin = end;
            end = split_start(output, split + 1);
        }
    }
    pair_rows(total);
    if constexpr (EPILOGUE == VALUES) store_values<Leaving, TILE / 8>(shared, output, spot, total);
    if constexpr (EPILOGUE == SILU_MUL) store_gated<Leaving, TILE / 8>(shared, output, spot, total);
    if constexpr (EPILOGUE == ADD) store_sums<Leaving, TILE / 8>(shared, output, spot, total, feature);
}

}  // namespace

#define MMA(NAME, EPILOGUE)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(                                                        \
        const __nv_bfloat16 *matrix, int matrix_stride, const __nv_bfloat16 *batch, int batch_stride,                  \
        const __grid_constant__ Output output) {                                                                       \
        gemm_mma<EPILOGUE>(matrix, matrix_stride, batch, batch_stride, output);                                        \
    }

MMA(gemm_mma_values, VALUES)
MMA(gemm_mma_add, ADD)
MMA(gemm_mma_silu_mul, SILU_MUL)
