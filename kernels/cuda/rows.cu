// Ops that work on rows: embedding, RMSNorm, RoPE with the cache write, gathering rows.
//
// Bytes moved are those of the operands, read and written once; none of these does arithmetic that counts. The
// residual stream is f32; operands of products are bf16.
#include "attention.cuh"
#include "common.cuh"
#include "e4m3.cuh"

namespace {

constexpr int NORM_THREADS = 256;
constexpr int ROPE_WARPS = 8;
constexpr int HEAD_DIM_MAX = 256;

}  // namespace

/// out[row] = table[token of row], bf16 to f32. Grid: rows. `fed` holds the choices of the step before.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
embed(const __nv_bfloat16 *table, int table_stride, const Row *rows, const uint32_t *fed, float *out, int width,
      int out_stride) {
    launch_dependents();
    wait_for_predecessor();
    const Row row = rows[blockIdx.x];
    const uint32_t token = row.feed == NO_SLOT ? row.token : fed[row.feed];
    const __nv_bfloat16 *source = table + size_t(token) * table_stride;
    float *target = out + size_t(blockIdx.x) * out_stride;
    for (int i = threadIdx.x; i < width; i += NORM_THREADS) target[i] = __bfloat162float(source[i]);
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

/// What rope_cache works on. A row of qkv holds heads queries, then kv_heads keys, then kv_heads values.
struct RopeShape {
    int heads;
    int kv_heads;
    int head_dim;
    /// Pairs that are turned: element i with element i + pairs.
    int pairs;
    int qkv_stride;
    int query_stride;
    float eps;
    /// One over the scales of a cache in 8 bits.
    float key_factor;
    float value_factor;
};

namespace {

/// Writes a head of a key or value into its page, in bf16.
__device__ __forceinline__ void write_page(__nv_bfloat16 *cache, const float *values, uint32_t slot, uint32_t kv_head,
                                           bool is_value, const RopeShape &shape, int lane) {
    __nv_bfloat16 *page =
        cache + millrace::page_start(slot / 16, is_value ? 1 : 0, shape.kv_heads, kv_head, shape.head_dim);
    for (int i = lane * 2; i < shape.head_dim; i += 64)
        *reinterpret_cast<uint32_t *>(page + millrace::page_offset(shape.head_dim, slot % 16, i)) =
            pack_bf16(values[i], values[i + 1]);
}

/// The same in 8 bits. The elements of a value lie apart, for its page is read along the tokens.
__device__ __forceinline__ void write_page(uint8_t *cache, const float *values, uint32_t slot, uint32_t kv_head,
                                           bool is_value, const RopeShape &shape, int lane) {
    uint8_t *page =
        cache + millrace::page_start(slot / 16, is_value ? 1 : 0, shape.kv_heads, kv_head, shape.head_dim);
    const float factor = is_value ? shape.value_factor : shape.key_factor;
    for (int i = lane * 2; i < shape.head_dim; i += 64) {
        const uint32_t codes = millrace::e4m3_of(values[i] * factor, values[i + 1] * factor);
        if (is_value) {
            page[millrace::fp8_value_offset(slot % 16, i)] = uint8_t(codes);
            page[millrace::fp8_value_offset(slot % 16, i + 1)] = uint8_t(codes >> 8);
        } else {
            *reinterpret_cast<uint16_t *>(page + millrace::fp8_key_offset(slot % 16, i)) = uint16_t(codes);
        }
    }
}

template <class Element>
__device__ __forceinline__ void rope(const float *qkv, const Row *rows, const float *table, const float *q_norm,
                                     const float *k_norm, __nv_bfloat16 *queries, Element *cache,
                                     const RopeShape &shape) {
    __shared__ float staged[ROPE_WARPS][HEAD_DIM_MAX];
    launch_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.y * ROPE_WARPS + warp;
    if (head >= shape.heads + 2 * shape.kv_heads) return;
    wait_for_predecessor();
    const Row row = rows[blockIdx.x];
    const float *source = qkv + size_t(blockIdx.x) * shape.qkv_stride + head * shape.head_dim;
    const bool is_query = head < shape.heads, is_value = head >= shape.heads + shape.kv_heads;
    float *values = staged[warp];
    float squares = 0.0f;
    for (int i = lane; i < shape.head_dim; i += 32) {
        const float value = source[i];
        values[i] = value;
        squares += value * value;
    }
    __syncwarp();
    const float *norm = is_value ? nullptr : is_query ? q_norm : k_norm;
    if (norm != nullptr) {
        const float factor = 1.0f / sqrtf(warp_sum(squares) / shape.head_dim + shape.eps);
        for (int i = lane; i < shape.head_dim; i += 32) values[i] = values[i] * factor * norm[i];
        __syncwarp();
    }
    if (!is_value) {
        const float *cosines = table + size_t(row.position) * 2 * shape.pairs, *sines = cosines + shape.pairs;
        for (int i = lane; i < shape.pairs; i += 32) {
            const float a = values[i], b = values[i + shape.pairs];
            values[i] = a * cosines[i] - b * sines[i];
            values[i + shape.pairs] = b * cosines[i] + a * sines[i];
        }
        __syncwarp();
    }
    if (is_query) {
        __nv_bfloat16 *target = queries + size_t(blockIdx.x) * shape.query_stride + head * shape.head_dim;
        for (int i = lane * 2; i < shape.head_dim; i += 64)
            *reinterpret_cast<uint32_t *>(target + i) = pack_bf16(values[i], values[i + 1]);
        return;
    }
    if (row.slot == NO_SLOT) return;
    const uint32_t kv_head = is_value ? head - shape.heads - shape.kv_heads : head - shape.heads;
    write_page(cache, values, row.slot, kv_head, is_value, shape, lane);
}

}  // namespace

/// Norms (if weights are given) and turns queries and keys; writes queries as bf16 rows, keys and values into the
/// cache of one layer, in the pages of attention.cuh. One warp per head. Grid: (rows, heads / 8).
extern "C" __global__ void __launch_bounds__(ROPE_WARPS * 32)
rope_cache(const float *qkv, const Row *rows, const float *table, const float *q_norm, const float *k_norm,
           __nv_bfloat16 *queries, __nv_bfloat16 *cache, RopeShape shape) {
    rope(qkv, rows, table, q_norm, k_norm, queries, cache, shape);
}

/// The same for a cache of 8-bit floats.
extern "C" __global__ void __launch_bounds__(ROPE_WARPS * 32)
rope_cache_fp8(const float *qkv, const Row *rows, const float *table, const float *q_norm, const float *k_norm,
               __nv_bfloat16 *queries, uint8_t *cache, RopeShape shape) {
    rope(qkv, rows, table, q_norm, k_norm, queries, cache, shape);
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
