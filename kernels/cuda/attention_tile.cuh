//! The arithmetic that all attention kernels share: matrix fragments, the online softmax, the merging of splits.
//!
//! Invariant: a query row's result depends on its own numbers alone and is reached by the same roundings in every
//! kernel. So each step here is spelled out in rounding intrinsics, which the compiler may neither fuse nor
//! reorder, and a tile in which a row sees no key changes nothing of that row (its factor is 2^0 = 1 exactly).
//!
//! Fragments are those of m16n8k16: a thread holds, of rows `lane / 4` and `lane / 4 + 8`, columns
//! `8 * j + 2 * (lane % 4)` and the one after. The accumulators of wgmma lie in the same way within each warp.

#pragma once

#include "attention.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define MILLRACE_BULK_COPY 1
#endif

namespace millrace {

using bf16 = __nv_bfloat16;

/// What a cache holds: bf16, or 8-bit floats.
enum class Kv { Bf16, Fp8 };

__host__ __device__ constexpr uint32_t element_bytes(Kv kv) { return kv == Kv::Bf16 ? 2 : 1; }

/// A page of a layer's cache in global memory, of one of the cache's heads.
template <int HEAD, Kv KV>
__device__ __forceinline__ const char* page_address(const AttentionArguments& arguments, uint32_t block,
                                                    uint32_t value, uint32_t cache_head) {
    return static_cast<const char*>(arguments.cache) +
           page_start(block, value, arguments.cache_heads, cache_head, HEAD) * element_bytes(KV);
}

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

/// 2^x. Exact at 0 and at minus infinity. Volatile, so that the compiler keeps its place.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// Two floats as bf16, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

/// Returns when the kernels before this one have ended and their writes can be seen.
__device__ __forceinline__ void await_predecessor() {
#ifdef MILLRACE_BULK_COPY
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next kernel's CTAs start where there is room.
__device__ __forceinline__ void release_successor() {
#ifdef MILLRACE_BULK_COPY
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void copy16_async(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Returns when all but the last `LEFT` committed groups of this thread have landed.
template <int LEFT>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

__device__ __forceinline__ void store16_shared(uint32_t to, uint4 value) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

// ---- Barriers of the bulk copy engine (sm_90) ----

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(barrier) : "memory");
}

/// Returns when the barrier's phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef MILLRACE_BULK_COPY
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
#else
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
#endif
}

#ifdef MILLRACE_BULK_COPY
/// Arrives, and lets the barrier's phase last until `bytes` have been copied.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

/// What is read once in a step may leave the L2 cache first: the policy that `createpolicy` makes for it.
constexpr uint64_t EVICT_FIRST = 0x12f0000000000000;

/// `copy_bulk` of what no other CTA reads.
__device__ __forceinline__ void copy_bulk_once(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
        "%4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(EVICT_FIRST)
        : "memory");
}

/// Orders this thread's ordinary writes to shared memory before later reads and writes of the async proxy.
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#else
__device__ __forceinline__ void fence_async_proxy() {}

/// Arrives once this thread's copies so far have landed.
__device__ __forceinline__ void barrier_arrive_after_copies(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
#endif

// ---- Tensor core operands ----

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

/// `c += a * b`, m16n8k16.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Where, within a page in shared memory, this lane's row of the four 8 x 8 matrices lies that make two key
/// columns of B at step `step` of the head (16 elements).
template <int HEAD>
__device__ __forceinline__ uint32_t key_matrices(uint32_t lane, uint32_t step) {
    const uint32_t key = lane / 16 * 8 + lane % 8;
    return page_offset(HEAD, key, step * 16 + lane / 8 % 2 * 8) * 2;
}

/// The same for values, transposed on load: two columns of B (16 elements of the head) over the page's 16 keys.
template <int HEAD>
__device__ __forceinline__ uint32_t value_matrices(uint32_t lane, uint32_t column_pair) {
    const uint32_t key = lane / 8 % 2 * 8 + lane % 8;
    return page_offset(HEAD, key, column_pair * 16 + lane / 16 * 8) * 2;
}

/// `s += q * K^T` for the 16 keys of a page.
template <int HEAD>
__device__ __forceinline__ void score_step(float (&s0)[4], float (&s1)[4], const uint32_t (&q)[4], uint32_t page,
                                           uint32_t lane, uint32_t step) {
    uint32_t k[4];
    load_matrices(k, page + key_matrices<HEAD>(lane, step));
    multiply(s0, q, k[0], k[1]);
    multiply(s1, q, k[2], k[3]);
}

/// `o += p * V` for the 16 keys of a page.
template <int HEAD>
__device__ __forceinline__ void accumulate_page(float (&o)[HEAD / 8][4], const uint32_t (&p)[4], uint32_t page,
                                                uint32_t lane) {
#pragma unroll
    for (int pair = 0; pair < HEAD / 16; ++pair) {
        uint32_t v[4];
        load_matrices_transposed(v, page + value_matrices<HEAD>(lane, pair));
        multiply(o[2 * pair], p, v[0], v[1]);
        multiply(o[2 * pair + 1], p, v[2], v[3]);
    }
}

// ---- The same products, transposed ----
//
// A decode has at most 8 query rows, which fit the N side of m16n8k16 without padding: S^T = K Q^T, O^T = V^T P^T.
// A thread then holds keys (or elements) `lane / 4` and `lane / 4 + 8` of a page, of rows `2 * (lane % 4)` and the
// one after. Each dot product has the same terms in the same steps of 16, so its bits are the same.

/// This lane's row of the four matrices of K as the A operand, at step `step` of the head.
template <int HEAD>
__device__ __forceinline__ uint32_t key_rows(uint32_t lane, uint32_t step) {
    return page_offset(HEAD, lane / 8 % 2 * 8 + lane % 8, step * 16 + lane / 16 * 8) * 2;
}

/// The same of V^T (transposed on load): 16 elements of the head from `16 * part` on.
template <int HEAD>
__device__ __forceinline__ uint32_t value_rows(uint32_t lane, uint32_t part) {
    return page_offset(HEAD, lane / 16 * 8 + lane % 8, part * 16 + lane / 8 % 2 * 8) * 2;
}

/// Transposes an 8 x 8 matrix of 16-bit elements held by a warp.
__device__ __forceinline__ uint32_t transposed(uint32_t row) {
    uint32_t column;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(column) : "r"(row));
    return column;
}

// ---- The online softmax ----

/// Of one query row: the greatest score so far times `scale_log2`, rounded, and this thread's share of the sum.
struct RowSum {
    float top;
    float sum;
};

__device__ __forceinline__ RowSum empty_row() { return {minus_infinity(), 0.f}; }

/// Greatest value among the four threads that hold a row.
__device__ __forceinline__ float row_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
    return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

/// Sum over the four threads that hold a row; all four get the same bits, addition being commutative.
__device__ __forceinline__ float row_sum(float value) {
    value = __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, 1));
    return __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

/// What a score is measured from: 0 for a row that has seen no key, so that no infinities are subtracted.
__device__ __forceinline__ float anchor(float top) { return top == minus_infinity() ? 0.f : top; }

#ifndef MILLRACE_SCORES_CAPPED
#define MILLRACE_SCORES_CAPPED 0
#endif

/// `cap * tanh(score * factor / cap)` of each score where the source says so; what is hidden stays so.
template <int COLUMNS>
__device__ __forceinline__ void cap_scores(float (&s)[COLUMNS][4], const AttentionArguments& arguments) {
    if constexpr (MILLRACE_SCORES_CAPPED) {
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float power = exp2_approx(__fmul_rn(s[j][e], arguments.cap_rate));
                const float capped = __fmaf_rn(-2.f * arguments.cap, __frcp_rn(__fadd_rn(1.f, power)), arguments.cap);
                s[j][e] = isinf(s[j][e]) ? s[j][e] : capped;
            }
        }
    }
}

/// Turns the scores of row `HALF` (0: `lane / 4`, 1: that plus 8) of a tile into weights, adds them to the row's
/// sum, and returns the factor for what the row has accumulated so far.
template <int COLUMNS, int HALF>
__device__ __forceinline__ float soften(float (&s)[COLUMNS][4], RowSum& row, float scale_log2) {
    float top = s[0][2 * HALF];
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) top = fmaxf(top, fmaxf(s[j][2 * HALF], s[j][2 * HALF + 1]));
    top = fmaxf(row.top, __fmul_rn(row_max(top), scale_log2));
    const float from = anchor(top);
    const float factor = exp2_approx(__fsub_rn(row.top, from));
    float even = 0.f, odd = 0.f;
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
        s[j][2 * HALF] = exp2_approx(__fmaf_rn(s[j][2 * HALF], scale_log2, -from));
        s[j][2 * HALF + 1] = exp2_approx(__fmaf_rn(s[j][2 * HALF + 1], scale_log2, -from));
        even = __fadd_rn(even, s[j][2 * HALF]);
        odd = __fadd_rn(odd, s[j][2 * HALF + 1]);
    }
    row.top = top;
    row.sum = __fmaf_rn(row.sum, factor, __fadd_rn(even, odd));
    return factor;
}

/// Greatest score of row `ROW` (0 or 1) of the thread's two over a tile, in the transposed form.
template <int PAGES, int ROW>
__device__ __forceinline__ float tile_max_transposed(const float (&s)[PAGES][4]) {
    float top = s[0][ROW];
#pragma unroll
    for (int i = 0; i < PAGES; ++i) top = fmaxf(top, fmaxf(s[i][ROW], s[i][2 + ROW]));
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2)
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, distance));
    return top;
}

/// Turns the scores of row `ROW` of a tile into weights, measured `from` the greatest so far, and returns this
/// thread's share of their sum. It goes as in `soften`: the keys of one residue modulo 8 in ascending order, then
/// even and odd residues together.
template <int PAGES, int ROW>
__device__ __forceinline__ float soften_transposed(float (&s)[PAGES][4], float from, float scale_log2) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < PAGES; ++i) {
        s[i][ROW] = exp2_approx(__fmaf_rn(s[i][ROW], scale_log2, -from));
        s[i][2 + ROW] = exp2_approx(__fmaf_rn(s[i][2 + ROW], scale_log2, -from));
        sum = __fadd_rn(__fadd_rn(sum, s[i][ROW]), s[i][2 + ROW]);
    }
    return __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, 4));
}

/// `row_sum` in the transposed form.
__device__ __forceinline__ float row_sum_transposed(float value) {
    value = __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, 8));
    return __fadd_rn(value, __shfl_xor_sync(0xffffffffu, value, 16));
}

/// Hides from row `HALF` all keys of a tile outside of `[first, end)`; `key` is the position of this thread's
/// first column.
template <int COLUMNS, int HALF>
__device__ __forceinline__ void hide(float (&s)[COLUMNS][4], uint32_t key, uint32_t first, uint32_t end) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const uint32_t at = key + j * 8 + e;
            if (at < first || at >= end) s[j][2 * HALF + e] = minus_infinity();
        }
    }
}

/// Factors of the merge of a later split's result onto an earlier one's.
struct MergeFactors {
    float earlier;
    float later;
};

/// Merges the row states (`sum` over the whole row); accumulators merge by `merged`.
__device__ __forceinline__ MergeFactors merge_rows(RowSum& total, const RowSum& split) {
    const float top = fmaxf(total.top, split.top);
    const float from = anchor(top);
    const MergeFactors factors = {exp2_approx(__fsub_rn(total.top, from)), exp2_approx(__fsub_rn(split.top, from))};
    total.top = top;
    total.sum = __fmaf_rn(split.sum, factors.later, __fmul_rn(total.sum, factors.earlier));
    return factors;
}

__device__ __forceinline__ float merged(float total, float split, const MergeFactors& factors) {
    return __fmaf_rn(split, factors.later, __fmul_rn(total, factors.earlier));
}

/// One over a row's sum of weights, times the factor on the values' codes if there is one.
template <Kv KV>
__device__ __forceinline__ float output_factor(float sum, const AttentionArguments& arguments) {
    const float inverse = __frcp_rn(sum);
    return KV == Kv::Bf16 ? inverse : __fmul_rn(inverse, arguments.value_scale);
}

/// A finished element: the weighted sum over the sum of weights. Adding 0 turns -0 into 0: whether a row has gone
/// through tiles of which it saw nothing must not show in the sign of a zero.
__device__ __forceinline__ float finished(float total, float inverse) {
    return __fadd_rn(__fmul_rn(total, inverse), 0.f);
}

/// First position that the row at `position` sees.
__device__ __forceinline__ uint32_t window_first(uint32_t position, uint32_t window) {
    return window == 0 || position < window ? 0 : position + 1 - window;
}

}  // namespace millrace
