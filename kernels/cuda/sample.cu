// The next token of each row, out of f32 logits: the order of sampling::sample_row on the host, without a sort.
//
// Weights exp((logit - maximum) / temperature) are summed as integers of 2^-40, so that neither the cut nor the draw
// depends on the order of additions. The random number is Philox at (seed, position), as on the host. A row whose
// logits are not numbers is marked and harms no other. Which kernels work on a row depends on its own parameters alone.
// Bytes: the logits once, several times where tokens are cut.
#include "common.cuh"

namespace {

constexpr int PART = 4096;  // tokens per block where a row is shared out
constexpr int THREADS = 256;
constexpr int CUT_THREADS = 1024;
constexpr int TOP_MAX = 20;
/// Parts of the largest vocabulary, 2^24.
constexpr int PARTS_MAX = 4096;
constexpr uint64_t KEEP_ALL = 0;

}  // namespace

/// How a row's token is chosen; 64 bytes, as the host writes them.
struct SampleParameters {
    float temperature;
    float top_p;
    float min_p;
    float repetition_penalty;
    float presence_penalty;
    float frequency_penalty;
    uint32_t top_k;
    /// 0: none; n + 1: of the chosen token and of n others.
    uint32_t logprobs;
    uint64_t seed;
    uint32_t position;
    /// The row's adjustments.
    uint32_t adjust_first;
    uint32_t adjust_count;
    uint32_t reserved[3];
};

/// A token whose logit changes; each at most once per row.
struct Adjustment {
    uint32_t token;
    float bias;
    /// Occurrences in the output.
    uint32_t count;
    /// Whether penalties apply: the token is in prompt or output.
    uint32_t penalised;
    /// The logit before, written by the device.
    float raw;
};

/// A row's maximum within a part. Not a number if any logit is not.
struct PartMaximum {
    float value;
    uint32_t token;
};

struct SampleResult {
    uint32_t token;
    uint32_t poisoned;
};

/// Log probabilities of the raw logits.
struct SampleLogprobs {
    float chosen;
    float maximum;
    double normaliser;
    uint32_t tokens[TOP_MAX];
    float values[TOP_MAX];
};

namespace {

__device__ __forceinline__ uint64_t uniform_bits(uint64_t seed, uint32_t position) {
    uint32_t c0 = position, c1 = 0, c2 = 0, c3 = 0, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (uint64_t(c0) << 32 | c1) >> 11;
}

/// The greater maximum; of equals the lower token; what is not a number wins.
__device__ __forceinline__ PartMaximum greater(PartMaximum a, PartMaximum b) {
    if (isnan(a.value)) return a;
    if (isnan(b.value)) return b;
    if (a.value > b.value || (a.value == b.value && a.token < b.token)) return a;
    return b;
}

__device__ __forceinline__ PartMaximum warp_greatest(PartMaximum best) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        PartMaximum other;
        other.value = __shfl_xor_sync(0xffffffffu, best.value, offset);
        other.token = __shfl_xor_sync(0xffffffffu, best.token, offset);
        best = greater(best, other);
    }
    return best;
}

/// The row's maximum, out of those of its parts; for every thread of the warp.
__device__ __forceinline__ PartMaximum row_greatest(const PartMaximum *parts, int count) {
    PartMaximum best = {-INFINITY, 0xffffffffu};
    for (int part = threadIdx.x % 32; part < count; part += 32) best = greater(best, parts[part]);
    return warp_greatest(best);
}

__device__ __forceinline__ bool is_poisoned(PartMaximum best) { return !(fabsf(best.value) < INFINITY); }

/// The weight of a logit, 0 to 1. A temperature so low that its inverse overflows is greedy in all but name.
struct Weigh {
    float maximum;
    float inverse;
    __device__ Weigh(float maximum, float temperature)
        : maximum(maximum), inverse(fminf(1.0f / temperature, 1.8446743e19f)) {}
    __device__ float operator()(float logit) const { return expf((logit - maximum) * inverse); }
};

__device__ __forceinline__ uint64_t mass_of(float weight) { return __float2ull_rz(weight * 1099511627776.0f); }

/// Orders tokens by falling weight, then rising id; a token is kept when its key is at least the row's threshold.
__device__ __forceinline__ uint64_t key_of(float weight, uint32_t token) {
    return uint64_t(__float_as_uint(weight)) << 32 | uint32_t(~token);
}

/// Whether tokens are cut before the draw.
__device__ __forceinline__ bool cuts(const SampleParameters &p) {
    return p.temperature != 0.0f && (p.min_p > 0.0f || p.top_k > 0 || p.top_p < 1.0f);
}

template <int COUNT>
__device__ uint64_t block_sum_u64(uint64_t value) {
    __shared__ uint64_t partial[COUNT / 32];
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    uint64_t sum = 0;
    for (int warp = 0; warp < COUNT / 32; ++warp) sum += partial[warp];
    return sum;
}

/// The sum over all threads before this one.
template <int COUNT>
__device__ uint64_t block_prefix_u64(uint64_t value) {
    __shared__ uint64_t partial[COUNT / 32];
    const int lane = threadIdx.x % 32;
    uint64_t inclusive = value;
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint64_t other = __shfl_up_sync(0xffffffffu, inclusive, offset);
        if (lane >= offset) inclusive += other;
    }
    __syncthreads();
    if (lane == 31) partial[threadIdx.x / 32] = inclusive;
    __syncthreads();
    uint64_t before = inclusive - value;
    for (int warp = 0; warp < int(threadIdx.x / 32); ++warp) before += partial[warp];
    return before;
}

}  // namespace

/// Log probabilities' normaliser and most probable tokens, of the raw logits. Grid: rows.
extern "C" __global__ void __launch_bounds__(CUT_THREADS, 1)
sample_logprobs(const float *logits, int stride, int vocabulary, const SampleParameters *parameters, SampleLogprobs *out) {
    launch_dependents();
    wait_for_predecessor();
    const uint32_t wanted = parameters[blockIdx.x].logprobs;
    if (wanted == 0) return;
    const float *row = logits + size_t(blockIdx.x) * stride;
    __shared__ PartMaximum best_of_warp[CUT_THREADS / 32];
    __shared__ PartMaximum chosen;
    PartMaximum last = {INFINITY, 0};
    float maximum = 0.0f;
    const uint32_t count = min(wanted - 1, uint32_t(TOP_MAX));
    // The first round also gives the maximum; each round finds the next in the order of value, then of id.
    for (uint32_t place = 0; place < max(count, 1u); ++place) {
        PartMaximum best = {-INFINITY, 0xffffffffu};
        for (uint32_t token = threadIdx.x; token < uint32_t(vocabulary); token += CUT_THREADS) {
            const float value = row[token];
            const bool after = place == 0 || value < last.value || (value == last.value && token > last.token);
            if (after) best = greater(best, {value, token});
        }
        best = warp_greatest(best);
        __syncthreads();
        if (threadIdx.x % 32 == 0) best_of_warp[threadIdx.x / 32] = best;
        __syncthreads();
        if (threadIdx.x < 32) {
            best = warp_greatest(best_of_warp[threadIdx.x]);
            if (threadIdx.x == 0) chosen = best;
        }
        __syncthreads();
        last = chosen;
        if (place == 0) maximum = last.value;
        if (threadIdx.x == 0 && place < count) {
            out[blockIdx.x].tokens[place] = last.token;
            out[blockIdx.x].values[place] = last.value;
        }
    }
    __shared__ double sums[CUT_THREADS / 32];
    double sum = 0.0;
    for (int token = threadIdx.x; token < vocabulary; token += CUT_THREADS) sum += double(expf(row[token] - maximum));
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        for (double part : sums) total += part;
        out[blockIdx.x].maximum = maximum;
        out[blockIdx.x].normaliser = double(maximum) + log(total);
    }
}

/// Bias and penalties, in place. Grid: rows.
extern "C" __global__ void __launch_bounds__(THREADS)
sample_adjust(float *logits, int stride, int vocabulary, const SampleParameters *parameters, Adjustment *adjustments) {
    launch_dependents();
    wait_for_predecessor();
    const SampleParameters p = parameters[blockIdx.x];
    float *row = logits + size_t(blockIdx.x) * stride;
    for (uint32_t i = threadIdx.x; i < p.adjust_count; i += THREADS) {
        Adjustment &a = adjustments[p.adjust_first + i];
        float logit = row[a.token];
        a.raw = logit;
        logit += a.bias;
        if (a.penalised) {
            logit = logit > 0.0f ? logit / p.repetition_penalty : logit * p.repetition_penalty;
            if (a.count > 0) logit -= p.presence_penalty + p.frequency_penalty * float(a.count);
        }
        row[a.token] = logit;
    }
}

/// The maximum of each part of each row, and the part's mass beside its own maximum: one pass over the logits, which
/// stay in registers between the two. Grid: (parts, rows).
extern "C" __global__ void __launch_bounds__(THREADS)
sample_parts(const float *logits, int stride, int vocabulary, const SampleParameters *parameters, PartMaximum *maxima,
             uint64_t *masses) {
    constexpr int VECTORS = PART / THREADS / 4;
    launch_dependents();
    wait_for_predecessor();
    const float *row = logits + size_t(blockIdx.y) * stride;
    const int first = blockIdx.x * PART;
    float values[VECTORS][4];
    PartMaximum best = {-INFINITY, 0xffffffffu};
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int token = first + (i * THREADS + threadIdx.x) * 4;
        // The stride is a multiple of 4, so that a vector never leaves its row; what lies beyond the vocabulary is cut.
        const float4 v = token < stride ? *reinterpret_cast<const float4 *>(row + token) : make_float4(0, 0, 0, 0);
        const float loaded[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            values[i][j] = token + j < vocabulary ? loaded[j] : -INFINITY;
            best = greater(best, {values[i][j], uint32_t(token + j)});
        }
    }
    best = warp_greatest(best);
    __shared__ PartMaximum best_of_warp[THREADS / 32];
    if (threadIdx.x % 32 == 0) best_of_warp[threadIdx.x / 32] = best;
    __syncthreads();
    best = warp_greatest(best_of_warp[threadIdx.x % (THREADS / 32)]);
    const size_t place = size_t(blockIdx.y) * gridDim.x + blockIdx.x;
    if (threadIdx.x == 0) maxima[place] = best;
    const float temperature = parameters[blockIdx.y].temperature;
    if (temperature == 0.0f) return;
    const Weigh weigh(best.value, temperature);
    uint64_t mass = 0;
    if (best.value > -INFINITY) {
#pragma unroll
        for (int i = 0; i < VECTORS; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) mass += mass_of(weigh(values[i][j]));
    }
    mass = block_sum_u64<THREADS>(mass);
    if (threadIdx.x == 0) masses[place] = mass;
}

/// Where the tokens are cut by min_p, top_k and top_p. Grid: rows.
extern "C" __global__ void __launch_bounds__(CUT_THREADS, 1)
sample_cut(const float *logits, int stride, int vocabulary, const SampleParameters *parameters,
           const PartMaximum *maxima, int parts, uint64_t *thresholds) {
    launch_dependents();
    wait_for_predecessor();
    const SampleParameters p = parameters[blockIdx.x];
    uint64_t threshold = KEEP_ALL;
    const PartMaximum best = row_greatest(maxima + size_t(blockIdx.x) * parts, parts);
    if (!cuts(p) || is_poisoned(best)) return;
    const float *row = logits + size_t(blockIdx.x) * stride;
    const Weigh weigh(best.value, p.temperature);
    if (p.min_p > 0.0f) threshold = uint64_t(__float_as_uint(fminf(p.min_p, 1.0f))) << 32;
    __shared__ uint32_t counts[1024];
    __shared__ unsigned long long masses[1024];
    __shared__ uint32_t found_bin;
    __shared__ uint64_t found_count, found_mass;
    for (int round = 0; round < 2; ++round) {
        const bool by_count = round == 0;
        if (by_count ? (p.top_k == 0 || p.top_k >= uint32_t(vocabulary)) : p.top_p >= 1.0f) continue;
        uint64_t wanted_count = by_count ? p.top_k : ~0ull, wanted_mass = ~0ull;
        uint64_t above_count = 0, above_mass = 0;
        uint32_t prefix = 0;
        // Ten bits of the weight at a time: the bin in which the cut lies.
        for (int level = 0; level < 3; ++level) {
            const int shift = 20 - 10 * level;
            for (int bin = threadIdx.x; bin < 1024; bin += CUT_THREADS) counts[bin] = 0, masses[bin] = 0;
            __syncthreads();
            for (int token = threadIdx.x; token < vocabulary; token += CUT_THREADS) {
                const float weight = weigh(row[token]);
                const uint32_t bits = __float_as_uint(weight);
                if (key_of(weight, token) < threshold) continue;
                if (level > 0 && bits >> (shift + 10) != prefix) continue;
                atomicAdd(&counts[(bits >> shift) & 1023], 1u);
                atomicAdd(&masses[(bits >> shift) & 1023], static_cast<unsigned long long>(mass_of(weight)));
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                if (!by_count && level == 0) {
                    uint64_t total = 0;
                    for (int bin = 0; bin < 1024; ++bin) total += masses[bin];
                    // At least one token stays, as a share of nothing is nothing.
                    found_mass = uint64_t(double(fmaxf(p.top_p, 0.0f)) * double(total));
                }
                const uint64_t mass_goal = by_count ? ~0ull : (level == 0 ? found_mass : wanted_mass);
                uint64_t count = above_count, mass = above_mass;
                int bin = 1023;
                int lowest = -1;
                for (; bin >= 0; --bin) {
                    if (counts[bin] == 0) continue;
                    lowest = bin;
                    if (count + counts[bin] >= wanted_count || mass + masses[bin] >= mass_goal) break;
                    count += counts[bin];
                    mass += masses[bin];
                }
                if (bin < 0 && lowest >= 0) {
                    // Rounding left the goal just out of reach: the last bin holds the cut.
                    bin = lowest;
                    count -= counts[bin];
                    mass -= masses[bin];
                }
                found_bin = uint32_t(bin);
                found_count = count;
                masses[0] = mass;
                masses[1] = mass_goal;
            }
            __syncthreads();
            above_count = found_count;
            above_mass = masses[0];
            wanted_mass = masses[1];
            prefix = prefix << 10 | found_bin;
            __syncthreads();
        }
        // All tokens of this very weight are equal: as many of them as are still wanted, by rising id.
        const uint64_t each = mass_of(__uint_as_float(prefix));
        uint64_t need = by_count ? wanted_count - above_count
                                 : (each == 0 ? ~0ull : (wanted_mass - min(wanted_mass, above_mass) + each - 1) / each);
        if (need == 0) need = 1;
        const int share = (vocabulary + CUT_THREADS - 1) / CUT_THREADS;
        const int first = threadIdx.x * share, end = min(first + share, vocabulary);
        uint64_t mine = 0;
        for (int token = first; token < end; ++token) {
            const float weight = weigh(row[token]);
            mine += __float_as_uint(weight) == prefix && key_of(weight, token) >= threshold;
        }
        uint64_t before = block_prefix_u64<CUT_THREADS>(mine);
        __syncthreads();
        if (threadIdx.x == 0) found_mass = uint64_t(prefix) << 32;
        __syncthreads();
        if (before < need && need <= before + mine) {
            for (int token = first; token < end; ++token) {
                const float weight = weigh(row[token]);
                if (__float_as_uint(weight) != prefix || key_of(weight, token) < threshold) continue;
                if (++before == need) found_mass = key_of(weight, token);
            }
        }
        __syncthreads();
        threshold = max(threshold, found_mass);
        __syncthreads();
    }
    if (threadIdx.x == 0) thresholds[blockIdx.x] = threshold;
}

/// The mass of each part of rows whose tokens are cut, beside the row's maximum. Grid: (parts, rows).
extern "C" __global__ void __launch_bounds__(THREADS)
sample_mass(const float *logits, int stride, int vocabulary, const SampleParameters *parameters,
            const PartMaximum *maxima, const uint64_t *thresholds, uint64_t *masses) {
    launch_dependents();
    wait_for_predecessor();
    const SampleParameters p = parameters[blockIdx.y];
    if (!cuts(p)) return;
    const PartMaximum best = row_greatest(maxima + size_t(blockIdx.y) * gridDim.x, gridDim.x);
    if (is_poisoned(best)) return;
    const Weigh weigh(best.value, p.temperature);
    const uint64_t threshold = thresholds[blockIdx.y];
    const float *row = logits + size_t(blockIdx.y) * stride;
    const int first = blockIdx.x * PART, end = min(first + PART, vocabulary);
    uint64_t mass = 0;
    for (int token = first + threadIdx.x; token < end; token += THREADS) {
        const float weight = weigh(row[token]);
        if (key_of(weight, token) >= threshold) mass += mass_of(weight);
    }
    mass = block_sum_u64<THREADS>(mass);
    if (threadIdx.x == 0) masses[size_t(blockIdx.y) * gridDim.x + blockIdx.x] = mass;
}

/// The token. Grid: rows. `fed` keeps it for the step that follows. Masses of rows that are not cut stand beside the
/// maxima of their parts.
extern "C" __global__ void __launch_bounds__(THREADS)
sample_draw(const float *logits, int stride, int vocabulary, const SampleParameters *parameters,
            const PartMaximum *maxima, const uint64_t *thresholds, const uint64_t *masses, int parts,
            SampleResult *results, uint32_t *fed) {
    launch_dependents();
    wait_for_predecessor();
    const SampleParameters p = parameters[blockIdx.x];
    const PartMaximum *maximum_of_part = maxima + size_t(blockIdx.x) * parts;
    const PartMaximum best = row_greatest(maximum_of_part, parts);
    SampleResult *result = results + blockIdx.x;
    if (is_poisoned(best) || p.temperature == 0.0f) {
        if (threadIdx.x == 0) {
            const bool poisoned = is_poisoned(best);
            *result = {poisoned ? 0 : best.token, poisoned ? 1u : 0u};
            fed[blockIdx.x] = poisoned ? 0 : best.token;
        }
        return;
    }
    const bool cut = cuts(p);
    const Weigh weigh_parts(best.value, p.temperature);
    const uint64_t *mass_of_part = masses + size_t(blockIdx.x) * parts;
    // A part's mass beside the row's maximum.
    __shared__ uint64_t scaled[PARTS_MAX];
    __shared__ int chosen;
    __shared__ uint64_t rest;
    for (int part = threadIdx.x; part < parts; part += THREADS) {
        const uint64_t mass = mass_of_part[part];
        scaled[part] =
            cut ? mass : uint64_t(double(mass) * double(weigh_parts(maximum_of_part[part].value)));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        uint64_t total = 0;
        for (int part = 0; part < parts; ++part) total += scaled[part];
        uint64_t left = __umul64hi(uniform_bits(p.seed, p.position) << 11, total);
        int part = 0;
        while (part + 1 < parts && left >= scaled[part]) left -= scaled[part++];
        chosen = part;
        // The place inside of the part, in the part's own measure.
        const double share = double(left) / double(scaled[part]);
        rest = cut ? left : min(uint64_t(share * double(mass_of_part[part])), mass_of_part[part] - 1);
    }
    __syncthreads();
    const int part = chosen;
    const uint64_t left = rest;
    const Weigh weigh(cut ? best.value : maximum_of_part[part].value, p.temperature);
    const uint64_t threshold = cut ? thresholds[blockIdx.x] : KEEP_ALL;
    const float *row = logits + size_t(blockIdx.x) * stride;
    const int first = part * PART + threadIdx.x * (PART / THREADS), end = min(first + PART / THREADS, vocabulary);
    uint64_t mine = 0;
    for (int token = first; token < end; ++token) {
        const float weight = weigh(row[token]);
        if (key_of(weight, token) >= threshold) mine += mass_of(weight);
    }
    uint64_t before = block_prefix_u64<THREADS>(mine);
    if (left < before || left >= before + mine) return;
    for (int token = first; token < end; ++token) {
        const float weight = weigh(row[token]);
        if (key_of(weight, token) < threshold) continue;
        const uint64_t mass = mass_of(weight);
        if (left < before + mass) {
            *result = {uint32_t(token), 0};
            fed[blockIdx.x] = uint32_t(token);
            return;
        }
        before += mass;
    }
}

/// The chosen token's log probability and those of the others, out of the raw logits. Grid: rows.
extern "C" __global__ void __launch_bounds__(32)
sample_finish(const float *logits, int stride, int vocabulary, const SampleParameters *parameters, const Adjustment *adjustments,
              const SampleResult *results, SampleLogprobs *out) {
    launch_dependents();
    wait_for_predecessor();
    const SampleParameters p = parameters[blockIdx.x];
    if (p.logprobs == 0 || threadIdx.x != 0) return;
    const uint32_t token = results[blockIdx.x].token;
    float raw = logits[size_t(blockIdx.x) * stride + token];
    for (uint32_t i = 0; i < p.adjust_count; ++i)
        if (adjustments[p.adjust_first + i].token == token) raw = adjustments[p.adjust_first + i].raw;
    SampleLogprobs &mine = out[blockIdx.x];
    mine.chosen = float(double(raw) - mine.normaliser);
    const uint32_t count = min(p.logprobs - 1, uint32_t(TOP_MAX));
    for (uint32_t i = 0; i < count; ++i) mine.values[i] = float(double(mine.values[i]) - mine.normaliser);
}
