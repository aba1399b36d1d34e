// Ops that work on rows: embedding, norms, additions of branches, RoPE with the cache write, gathering rows.
//
// Bytes moved are those of the operands, read and written once; none of these does arithmetic that counts. The
// residual stream is f32; operands of products are bf16.
#include "epilogue.cuh"

namespace {

constexpr int NORM_THREADS = 256;
constexpr int ROPE_WARPS = 8;
constexpr int HEAD_DIM_MAX = 256;

}  // namespace

/// out[row] = table[token of row] * factor, bf16 to f32, and what the first norm needs, if there is one. Grid: rows. `fed` holds
/// the choices of the step before.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
embed(const __nv_bfloat16 *table, int table_stride, float factor, const Row *rows, const uint32_t *fed, float *out,
      int width, int out_stride, const __grid_constant__ NormAfter norm) {
    launch_dependents();
    wait_for_predecessor();
    const Row row = rows[blockIdx.x];
    const uint32_t token = row.feed == NO_SLOT ? row.token : fed[row.feed];
    const __nv_bfloat16 *source = table + size_t(token) * table_stride;
    float *target = out + size_t(blockIdx.x) * out_stride;
    const bool has = norm.weight != nullptr;
    // A warp takes 64 values at a time: the group of a sum of squares.
    for (int first = threadIdx.x / 32 * 64; first < width; first += NORM_THREADS * 2) {
        float squares = 0.0f;
        for (int i = first + threadIdx.x % 32; i < min(first + 64, width); i += 32) {
            const float value = __bfloat162float(source[i]) * factor;
            target[i] = value;
            squares = __fmaf_rn(value, value, squares);
            if (has) norm.out[size_t(blockIdx.x) * norm.out_stride + i] = __float2bfloat16(value * norm.weight[i]);
        }
        squares = warp_sum(squares);
        if (has && threadIdx.x % 32 == 0) norm.squares[size_t(blockIdx.x) * norm.squares_stride + first / 64] = squares;
    }
}

/// out = x / sqrt(mean(x^2) + eps) * weight, f32 to bf16. Grid: rows.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
rms_norm(const float *x, int x_stride, const float *weight, float eps, __nv_bfloat16 *out, int out_stride, int width) {
    launch_dependents();
    wait_for_predecessor();
    const float *source = x + size_t(blockIdx.x) * x_stride;
    __nv_bfloat16 *target = out + size_t(blockIdx.x) * out_stride;
    float squares = 0.0f;
    const int vectors = width / 4;
    for (int i = threadIdx.x; i < vectors; i += NORM_THREADS) {
        const float4 v = reinterpret_cast<const float4 *>(source)[i];
        squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    for (int i = vectors * 4 + threadIdx.x; i < width; i += NORM_THREADS) squares += source[i] * source[i];
    const float factor = 1.0f / sqrtf(block_sum<NORM_THREADS>(squares) / width + eps);
    for (int i = threadIdx.x; i < vectors; i += NORM_THREADS) {
        const float4 v = reinterpret_cast<const float4 *>(source)[i];
        const float4 w = reinterpret_cast<const float4 *>(weight)[i];
        const uint2 packed = make_uint2(pack_bf16(v.x * factor * w.x, v.y * factor * w.y),
                                        pack_bf16(v.z * factor * w.z, v.w * factor * w.w));
        reinterpret_cast<uint2 *>(target)[i] = packed;
    }
    for (int i = vectors * 4 + threadIdx.x; i < width; i += NORM_THREADS)
        target[i] = __float2bfloat16(source[i] * factor * weight[i]);
}

/// out = x, f32 to bf16. Grid: rows.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
round_rows(const float *x, int x_stride, __nv_bfloat16 *out, int out_stride, int width) {
    launch_dependents();
    wait_for_predecessor();
    const float *source = x + size_t(blockIdx.x) * x_stride;
    __nv_bfloat16 *target = out + size_t(blockIdx.x) * out_stride;
    for (int i = threadIdx.x; i < width; i += NORM_THREADS) target[i] = __float2bfloat16(source[i]);
}

/// out = x / sqrt(mean(x^2) + eps) * weight, or `add`ed to what is there, f32. The rows may be the same. Grid: rows.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
norm_values(const float *x, int x_stride, const float *weight, float eps, float *out, int out_stride, int width, int add) {
    launch_dependents();
    wait_for_predecessor();
    const float *source = x + size_t(blockIdx.x) * x_stride;
    float *target = out + size_t(blockIdx.x) * out_stride;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += NORM_THREADS) squares = __fmaf_rn(source[i], source[i], squares);
    const float factor = 1.0f / sqrtf(block_sum<NORM_THREADS>(squares) / width + eps);
    for (int i = threadIdx.x; i < width; i += NORM_THREADS) {
        const float normed = source[i] * factor * weight[i];
        target[i] = add != 0 ? target[i] + normed : normed;
    }
}

/// out += factor * x, f32. Grid: rows.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
scaled_add(const float *x, int x_stride, float factor, float *out, int out_stride, int width) {
    launch_dependents();
    wait_for_predecessor();
    const float *source = x + size_t(blockIdx.x) * x_stride;
    float *target = out + size_t(blockIdx.x) * out_stride;
    for (int i = threadIdx.x; i < width; i += NORM_THREADS) target[i] = __fmaf_rn(source[i], factor, target[i]);
}

/// x = cap * tanh(x / cap), f32; what is no number or infinite stays. Grid: rows.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) cap_rows(float *x, int stride, float cap, int width) {
    launch_dependents();
    wait_for_predecessor();
    float *row = x + size_t(blockIdx.x) * stride;
    for (int i = threadIdx.x; i < width; i += NORM_THREADS) {
        const float value = row[i];
        row[i] = isinf(value) ? value : cap - 2.0f * cap / (1.0f + exp2f(value * (2.0f * 1.44269504f / cap)));
    }
}

/// Norms (if weights are given) and turns queries and keys of a product that only wrote values; writes queries as bf16
/// rows, keys and values into the cache of one layer, in the pages of attention.cuh. A row of qkv holds the queries, then
/// the keys, then the values; `pairs` are turned, element i with element i + pairs, if any. One warp per head. Grid: (rows,
/// heads / 8).
extern "C" __global__ void __launch_bounds__(ROPE_WARPS * 32)
rope_cache(const float *qkv, int qkv_stride, int pairs, const __grid_constant__ Heads heads) {
    __shared__ float staged[ROPE_WARPS][HEAD_DIM_MAX];
    launch_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, dim = heads.head_dim;
    const int head = blockIdx.y * ROPE_WARPS + warp;
    if (head >= heads.heads + 2 * heads.kv_heads) return;
    wait_for_predecessor();
    const Row row = heads.rows[blockIdx.x];
    const float *source = qkv + size_t(blockIdx.x) * qkv_stride + head * dim;
    const bool is_query = head < heads.heads, is_value = head >= heads.heads + heads.kv_heads;
    float *values = staged[warp];
    float squares = 0.0f;
    for (int i = lane; i < dim; i += 32) {
        const float value = source[i];
        values[i] = value;
        squares += value * value;
    }
    __syncwarp();
    const float *norm = is_value ? nullptr : is_query ? heads.q_norm : heads.k_norm;
    if (norm != nullptr) {
        const float factor = 1.0f / sqrtf(warp_sum(squares) / dim + heads.eps);
        for (int i = lane; i < dim; i += 32) values[i] = values[i] * factor * norm[i];
        __syncwarp();
    }
    if (!is_value) {
        const float *cosines = heads.table + size_t(row.position) * 2 * pairs, *sines = cosines + pairs;
        for (int i = lane; i < pairs; i += 32) {
            const float a = values[i], b = values[i + pairs];
            values[i] = a * cosines[i] - b * sines[i];
            values[i + pairs] = b * cosines[i] + a * sines[i];
        }
        __syncwarp();
    }
    if (is_query) {
        __nv_bfloat16 *target = heads.queries + size_t(blockIdx.x) * heads.query_stride + head * dim;
        for (int i = lane * 2; i < dim; i += 64)
            *reinterpret_cast<uint32_t *>(target + i) = pack_bf16(values[i], values[i + 1]);
        return;
    }
    if (row.slot == NO_SLOT) return;
    const PageTarget page = page_target(heads, head, row.slot);
    for (int i = lane * 2; i < dim; i += 64) write_pair(page, i, values[i], values[i + 1]);
}

/// out[i] = x[index[i]], rows of `words` 4-byte words. Grid: rows of out.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
gather_rows(const uint32_t *x, const uint32_t *index, uint32_t *out, int words) {
    launch_dependents();
    wait_for_predecessor();
    const uint32_t *source = x + size_t(index[blockIdx.x]) * words;
    uint32_t *target = out + size_t(blockIdx.x) * words;
    for (int i = threadIdx.x; i < words; i += NORM_THREADS) target[i] = source[i];
}
