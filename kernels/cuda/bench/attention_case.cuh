//! One batch of sequences for the attention kernels: made at random, launched, and computed again in f64.
//!
//! The cache is filled with not-a-number first and only the tokens that exist are written, so that a kernel which
//! lets anything else through shows it; the output is poisoned before each launch.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "../attention.cuh"
#include "../e4m3.cuh"

#define CHECK(call)                                                                            \
    do {                                                                                       \
        const cudaError_t status = (call);                                                     \
        if (status != cudaSuccess) {                                                           \
            std::printf("%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(status)); \
            std::exit(1);                                                                      \
        }                                                                                      \
    } while (0)

using namespace millrace;
using bf16 = __nv_bfloat16;

extern "C" {
#define DECLARE(name) __global__ void name(const __grid_constant__ AttentionArguments arguments)
DECLARE(attention_decode_h64);
DECLARE(attention_decode_h96);
DECLARE(attention_decode_h128);
DECLARE(attention_decode_h256);
DECLARE(attention_prefill_h64);
DECLARE(attention_prefill_h96);
DECLARE(attention_prefill_h128);
DECLARE(attention_prefill_h256);
DECLARE(attention_decode_runs_h64);
DECLARE(attention_decode_runs_h96);
DECLARE(attention_decode_runs_h128);
DECLARE(attention_decode_runs_fp8_h64);
DECLARE(attention_decode_runs_fp8_h96);
DECLARE(attention_decode_runs_fp8_h128);
DECLARE(attention_decode_fp8_h64);
DECLARE(attention_decode_fp8_h96);
DECLARE(attention_decode_fp8_h128);
DECLARE(attention_decode_fp8_h256);
DECLARE(attention_prefill_fp8_h64);
DECLARE(attention_prefill_fp8_h96);
DECLARE(attention_prefill_fp8_h128);
DECLARE(attention_prefill_fp8_h256);
DECLARE(attention_prefill_wgmma_h64);
DECLARE(attention_prefill_wgmma_h128);
#undef DECLARE
}

/// splitmix64: seeds differ per run, so that no input is tested twice.
struct Random {
    uint64_t state;
    uint64_t next() {
        uint64_t z = state += 0x9e3779b97f4a7c15ull;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        return z ^ z >> 31;
    }
    uint32_t below(uint32_t limit) { return uint32_t(next() % limit); }
    /// About normal: the sum of four uniform numbers, variance 1.
    float normal() {
        const uint64_t z = next();
        float sum = 0;
        for (int i = 0; i < 4; ++i) sum += float(z >> 16 * i & 0xffff) / 65536.f - 0.5f;
        return sum * 1.7320508f;
    }
};

template <class T>
struct DeviceArray {
    T* data = nullptr;
    size_t size = 0;
    explicit DeviceArray(size_t count) : size(count) { CHECK(cudaMalloc(&data, std::max<size_t>(count, 1) * sizeof(T))); }
    explicit DeviceArray(const std::vector<T>& from) : DeviceArray(from.size()) { write(from); }
    DeviceArray(const DeviceArray&) = delete;
    ~DeviceArray() { cudaFree(data); }
    void write(const std::vector<T>& from) {
        CHECK(cudaMemcpy(data, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
    }
    std::vector<T> read() const {
        std::vector<T> to(size);
        CHECK(cudaMemcpy(to.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost));
        return to;
    }
};

struct Shape {
    uint32_t head_dim, kv_heads, group, window;
    uint32_t heads() const { return kv_heads * group; }
};

enum class Kernel { Decode, Runs, Prefill, Wgmma, DecodeFp8, RunsFp8, PrefillFp8 };
inline bool is_runs(Kernel kernel) { return kernel == Kernel::Runs || kernel == Kernel::RunsFp8; }
inline bool is_decode(Kernel kernel) {
    return kernel == Kernel::Decode || kernel == Kernel::DecodeFp8 || is_runs(kernel);
}
inline bool reads_codes(Kernel kernel) {
    return kernel == Kernel::DecodeFp8 || kernel == Kernel::RunsFp8 || kernel == Kernel::PrefillFp8;
}
inline const char* name_of(Kernel kernel) {
    switch (kernel) {
        case Kernel::Decode: return "decode";
        case Kernel::Runs: return "runs";
        case Kernel::Prefill: return "prefill";
        case Kernel::Wgmma: return "wgmma";
        case Kernel::DecodeFp8: return "decode fp8";
        case Kernel::RunsFp8: return "runs fp8";
        default: return "prefill fp8";
    }
}
/// Equal parts, as few as there can be, into which a group is cut for decodes.
inline uint32_t parts_of(uint32_t group) {
    uint32_t parts = (group + GROUP_MAX - 1) / GROUP_MAX;
    while (group % parts != 0) ++parts;
    return parts;
}
/// Whether the kernel is made for heads of this size.
inline bool exists(Kernel kernel, uint32_t head_dim) {
    if (is_runs(kernel)) return head_dim <= 128;
    return kernel != Kernel::Wgmma || head_dim == 64 || head_dim == 128;
}

/// The value of a code (e4m3.cuh).
inline float e4m3_value(uint32_t code) {
    const uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
    const float magnitude = exponent == 15 && mantissa == 7 ? NAN
                            : exponent == 0                 ? std::ldexp(float(mantissa), -9)
                                                            : std::ldexp(float(8 + mantissa), int(exponent) - 10);
    return code & 0x80 ? -magnitude : magnitude;
}

using Entry = void (*)(AttentionArguments);

inline Entry entry_of(Kernel kernel, uint32_t head_dim) {
    switch (kernel) {
        case Kernel::Decode:
            return head_dim == 64    ? attention_decode_h64
                   : head_dim == 96  ? attention_decode_h96
                   : head_dim == 128 ? attention_decode_h128
                                     : attention_decode_h256;
        case Kernel::Runs:
            return head_dim == 64   ? attention_decode_runs_h64
                   : head_dim == 96 ? attention_decode_runs_h96
                                    : attention_decode_runs_h128;
        case Kernel::RunsFp8:
            return head_dim == 64   ? attention_decode_runs_fp8_h64
                   : head_dim == 96 ? attention_decode_runs_fp8_h96
                                    : attention_decode_runs_fp8_h128;
        case Kernel::Prefill:
            return head_dim == 64    ? attention_prefill_h64
                   : head_dim == 96  ? attention_prefill_h96
                   : head_dim == 128 ? attention_prefill_h128
                                     : attention_prefill_h256;
        case Kernel::DecodeFp8:
            return head_dim == 64    ? attention_decode_fp8_h64
                   : head_dim == 96  ? attention_decode_fp8_h96
                   : head_dim == 128 ? attention_decode_fp8_h128
                                     : attention_decode_fp8_h256;
        case Kernel::PrefillFp8:
            return head_dim == 64    ? attention_prefill_fp8_h64
                   : head_dim == 96  ? attention_prefill_fp8_h96
                   : head_dim == 128 ? attention_prefill_fp8_h128
                                     : attention_prefill_fp8_h256;
        default: return head_dim == 64 ? attention_prefill_wgmma_h64 : attention_prefill_wgmma_h128;
    }
}

/// The device's limits that launches need.
struct Device {
    uint32_t multiprocessors, shared_limit;
    /// CTAs of a decode: few ones make each go through many units.
    uint32_t decode_grid;
    /// Splits of a run.
    uint32_t run_splits = 2;
    Device() {
        cudaDeviceProp properties;
        CHECK(cudaGetDeviceProperties(&properties, 0));
        multiprocessors = properties.multiProcessorCount;
        decode_grid = multiprocessors;
        shared_limit = properties.sharedMemPerBlockOptin;
    }
};

/// Launches a kernel as a dependent of the one before it in the stream, as a worker does.
template <class... Parameters, class... Arguments>
void launch_dependent(void (*entry)(Parameters...), dim3 grid, uint32_t threads, uint32_t shared, cudaStream_t stream,
                      Arguments... arguments) {
    CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(entry), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared)));
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    CHECK(cudaLaunchKernelEx(&config, entry, Parameters(arguments)...));
}

inline void launch(const Device& device, Kernel kernel, const Shape& shape, const AttentionArguments& arguments,
                   uint32_t tiles, cudaStream_t stream = nullptr) {
    dim3 grid(device.multiprocessors);
    uint32_t threads = PREFILL_WGMMA_THREADS, shared = prefill_wgmma_shared_bytes(shape.head_dim);
    if (is_decode(kernel)) {
        grid = dim3(device.decode_grid);
        threads = is_runs(kernel) ? RUN_THREADS : DECODE_THREADS;
        shared = is_runs(kernel) ? RUN_SHARED_BYTES : decode_shared_bytes(device.shared_limit);
    } else if (kernel != Kernel::Wgmma) {
        grid = dim3(shape.kv_heads, std::max(tiles, 1u));
        threads = prefill_threads(shape.head_dim);
        shared = prefill_shared_bytes(shape.head_dim);
    }
    launch_dependent(entry_of(kernel, shape.head_dim), grid, threads, shared, stream, arguments);
}

/// The plan of a step, as the host writes it.
struct Plan {
    std::vector<AttentionSpan> spans;
    std::vector<DecodeItem> items;
    std::vector<uint32_t> runs;
    std::vector<PrefillTile> tiles;
    uint32_t run_splits;
    /// All spans go to one kind of kernel here; a worker sends spans of one row to a decode kernel.
    Plan(const Shape& shape, Kernel kernel, std::vector<AttentionSpan> from, uint32_t splits)
        : spans(std::move(from)), run_splits(splits) {
        for (uint32_t s = 0; s < spans.size(); ++s) {
            if (is_decode(kernel)) {
                for (uint32_t split = 0; split <= (spans[s].context - 1) / SPLIT_KEYS; ++split) {
                    if (split == 0 || split >= run_splits) runs.push_back(uint32_t(items.size()));
                    items.push_back({s, split});
                }
            } else {
                const uint32_t packed = spans[s].rows * shape.group, rows = prefill_tile_rows(shape.head_dim);
                for (uint32_t tile = 0; tile * rows < packed; ++tile) tiles.push_back({s, tile});
            }
        }
        const auto keys = [&](uint32_t run) {
            const uint32_t first = items[run].split * SPLIT_KEYS, length = items[run].split == 0 ? run_splits : 1;
            return std::min(spans[items[run].span].context - first, length * SPLIT_KEYS);
        };
        std::stable_sort(runs.begin(), runs.end(), [&](uint32_t a, uint32_t b) { return keys(a) > keys(b); });
        const auto last_row = [&](const PrefillTile& tile) {
            const AttentionSpan& span = spans[tile.span];
            const uint32_t end = (tile.tile + 1) * prefill_tile_rows(shape.head_dim) / shape.group;
            return span.context - span.rows + std::min(end, span.rows);
        };
        std::stable_sort(tiles.begin(), tiles.end(), [&](const PrefillTile& a, const PrefillTile& b) {
            return last_row(a) > last_row(b);
        });
    }
    AttentionCounts counts() const {
        return {uint32_t(items.size()), uint32_t(tiles.size()), uint32_t(runs.size()), run_splits};
    }
};

/// A cache with the keys and values of several sequences, and queries for every position of each. With `codes` the keys
/// and values are numbers of 8 bits, and the cache is there in bf16 and in codes: all kernels must agree then.
struct Case {
    Shape shape;
    std::vector<uint32_t> lengths, table_of, row_of, tables;
    uint32_t blocks = 0, rows = 0;
    float scale;
    std::vector<bf16> cache, queries;
    std::vector<uint8_t> codes;
    DeviceArray<bf16>* cache_device;
    DeviceArray<uint8_t>* codes_device;
    DeviceArray<bf16>* queries_device;
    DeviceArray<uint32_t>* tables_device;

    Case(const Shape& with, std::vector<uint32_t> contexts, Random& random, float sharpness, bool with_codes)
        : shape(with), lengths(std::move(contexts)), scale(1.f / std::sqrt(float(with.head_dim))) {
        for (const uint32_t length : lengths) {
            table_of.push_back(blocks);
            row_of.push_back(rows);
            blocks += (length + PAGE_TOKENS - 1) / PAGE_TOKENS;
            rows += length;
        }
        for (uint32_t block = 0; block < blocks; ++block) tables.push_back(block);
        for (uint32_t i = blocks; i > 1; --i) std::swap(tables[i - 1], tables[random.below(i)]);
        cache.resize(uint64_t(blocks) * 2 * shape.kv_heads * PAGE_TOKENS * shape.head_dim);
        std::memset(cache.data(), 0xff, cache.size() * sizeof(bf16));
        codes.assign(with_codes ? cache.size() : 0, 0xff);
        queries.resize(uint64_t(rows) * stride());
        for (bf16& q : queries) q = __float2bfloat16(random.normal() * sharpness);
        for (uint32_t s = 0; s < lengths.size(); ++s)
            for (uint32_t position = 0; position < lengths[s]; ++position)
                for (uint32_t head = 0; head < shape.kv_heads; ++head)
                    for (uint32_t d = 0; d < shape.head_dim; ++d)
                        for (uint32_t value = 0; value < 2; ++value) {
                            float number = random.normal();
                            if (with_codes) {
                                // Small ones, too: below 2^-6 codes have fewer bits.
                                const uint32_t code = e4m3_of(random.below(8) ? number : number * 0.01f);
                                codes[code_place(s, position, value, head, d)] = uint8_t(code);
                                number = e4m3_value(code);
                            }
                            cache[place(s, position, value, head, d)] = __float2bfloat16(number);
                        }
        cache_device = new DeviceArray<bf16>(cache);
        codes_device = new DeviceArray<uint8_t>(codes);
        queries_device = new DeviceArray<bf16>(queries);
        tables_device = new DeviceArray<uint32_t>(tables);
    }
    Case(const Case&) = delete;
    ~Case() {
        delete cache_device;
        delete codes_device;
        delete queries_device;
        delete tables_device;
    }

    /// A row of queries is followed by keys and values, as in a worker.
    uint32_t stride() const { return (shape.heads() + 2 * shape.kv_heads) * shape.head_dim; }
    uint64_t width() const { return uint64_t(shape.heads()) * shape.head_dim; }
    uint64_t page(uint32_t s, uint32_t position, uint32_t value, uint32_t head) const {
        return page_start(tables[table_of[s] + position / PAGE_TOKENS], value, shape.kv_heads, head, shape.head_dim);
    }
    uint64_t place(uint32_t s, uint32_t position, uint32_t value, uint32_t head, uint32_t d) const {
        return page(s, position, value, head) + page_offset(shape.head_dim, position % PAGE_TOKENS, d);
    }
    uint64_t code_place(uint32_t s, uint32_t position, uint32_t value, uint32_t head, uint32_t d) const {
        const uint32_t token = position % PAGE_TOKENS;
        return page(s, position, value, head) + (value ? fp8_value_offset(token, d) : fp8_key_offset(token, d));
    }

    /// A span of sequence `s` with its rows where the queries of those positions lie.
    AttentionSpan span(uint32_t s, uint32_t first, uint32_t count) const {
        return {row_of[s] + first, count, first + count, table_of[s]};
    }

    /// Runs the spans and returns the output of all rows; rows outside of the spans stay poisoned (0xffff).
    std::vector<uint16_t> run(const Device& device, Kernel kernel, const std::vector<AttentionSpan>& spans,
                              uint32_t times = 1) const {
        const Plan plan(shape, kernel, spans, device.run_splits);
        const DeviceArray<AttentionSpan> spans_device(plan.spans);
        const DeviceArray<DecodeItem> items(plan.items);
        const DeviceArray<uint32_t> runs(plan.runs);
        const DeviceArray<PrefillTile> tiles(plan.tiles);
        const DeviceArray<AttentionCounts> counts(std::vector<AttentionCounts>{plan.counts()});
        DeviceArray<float> partials(partial_floats(plan.items.size(), shape.heads(), shape.head_dim));
        DeviceArray<uint32_t> counters(counter_words(plan.spans.size(), shape.kv_heads * parts_of(shape.group)));
        DeviceArray<uint16_t> out(uint64_t(rows) * width());
        CHECK(cudaMemset(partials.data, 0xff, partials.size * sizeof(float)));
        CHECK(cudaMemset(counters.data, 0, counters.size * sizeof(uint32_t)));
        AttentionArguments arguments = {};
        arguments.queries = queries_device->data;
        arguments.out = reinterpret_cast<bf16*>(out.data);
        arguments.cache = reads_codes(kernel) ? static_cast<const void*>(codes_device->data) : cache_device->data;
        arguments.spans = spans_device.data;
        arguments.tables = tables_device->data;
        arguments.decode_items = items.data;
        arguments.decode_runs = runs.data;
        arguments.prefill_tiles = tiles.data;
        arguments.counts = counts.data;
        arguments.partials = partials.data;
        arguments.counters = counters.data;
        arguments.query_stride = stride();
        arguments.out_stride = uint32_t(width());
        const uint32_t parts = is_decode(kernel) ? parts_of(shape.group) : 1;
        arguments.kv_heads = shape.kv_heads * parts;
        arguments.group = shape.group / parts;
        arguments.cache_heads = shape.kv_heads;
        arguments.parts = parts;
        arguments.window = shape.window;
        arguments.items_max = uint32_t(plan.items.size());
        arguments.scale_log2 = scale * 1.44269504f;
        arguments.value_scale = 1.f;
        for (uint32_t time = 0; time < times; ++time) {
            CHECK(cudaMemset(out.data, 0xff, out.size * sizeof(uint16_t)));
            // Two tiles more than there are: surplus CTAs must leave.
            launch(device, kernel, shape, arguments, uint32_t(plan.tiles.size()) + 2);
            CHECK(cudaDeviceSynchronize());
        }
        for (const uint32_t word : counters.read())
            if (word != 0) std::printf("a counter is left at %u\n", word), std::exit(1);
        return out.read();
    }

    /// The output of one position and head, in f64.
    std::vector<double> reference(uint32_t s, uint32_t position, uint32_t head) const {
        const uint32_t kv_head = head / shape.group, dim = shape.head_dim;
        const uint32_t first = shape.window && position >= shape.window ? position + 1 - shape.window : 0;
        std::vector<double> query(dim), scores(position + 1), out(dim);
        for (uint32_t d = 0; d < dim; ++d)
            query[d] = __bfloat162float(queries[uint64_t(row_of[s] + position) * stride() + head * dim + d]);
        double top = -INFINITY, sum = 0;
        for (uint32_t key = first; key <= position; ++key) {
            double score = 0;
            for (uint32_t d = 0; d < dim; ++d) score += query[d] * __bfloat162float(cache[place(s, key, 0, kv_head, d)]);
            scores[key] = score * scale;
            top = std::max(top, scores[key]);
        }
        for (uint32_t key = first; key <= position; ++key) {
            const double weight = std::exp(scores[key] - top);
            sum += weight;
            for (uint32_t d = 0; d < dim; ++d) out[d] += weight * __bfloat162float(cache[place(s, key, 1, kv_head, d)]);
        }
        for (double& x : out) x /= sum;
        return out;
    }
};

/// Calls `body` for all numbers below `count`, on all cores.
inline void parallel(uint32_t count, const std::function<void(uint32_t)>& body) {
    const uint32_t threads = std::max(1u, std::thread::hardware_concurrency());
    std::vector<std::thread> running;
    for (uint32_t t = 0; t < threads; ++t)
        running.emplace_back([=, &body] {
            for (uint32_t i = t; i < count; i += threads) body(i);
        });
    for (std::thread& thread : running) thread.join();
}

inline float from_bits(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}
