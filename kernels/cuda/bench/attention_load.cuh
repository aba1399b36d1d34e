//! Loads to time attention with, alone and in a chain of kernels that stand for the products of a step.

#pragma once

#include "attention_case.cuh"

__global__ void fill_random(bf16* to, uint64_t count, uint64_t seed) {
    for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < count; i += uint64_t(gridDim.x) * blockDim.x) {
        uint64_t z = (i + seed) * 0x9e3779b97f4a7c15ull;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z ^= z >> 27;
        float sum = 0;
        for (int k = 0; k < 4; ++k) sum += float(z >> 16 * k & 0xffff) / 65536.f - 0.5f;
        to[i] = __float2bfloat16(sum * 1.7320508f);
    }
}

/// Makes codes of 8 bits of any bits, none of which is NaN: that would hide every other code of its row.
__global__ void make_codes(uint32_t* bits, uint64_t count) {
    for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < count; i += uint64_t(gridDim.x) * blockDim.x)
        bits[i] &= 0xbfbfbfbf;
}

/// Median time of one call in us; `calls` of them are captured into a graph and replayed.
inline double time_us(uint32_t calls, const std::function<void(uint32_t, cudaStream_t)>& call) {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    cudaEvent_t begin, end;
    CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    call(0, stream);
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (uint32_t i = 0; i < calls; ++i) call(i, stream);
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&replay, graph, 0));
    std::vector<float> times;
    for (int i = 0; i < 23; ++i) {
        float elapsed;
        CHECK(cudaEventRecord(begin, stream));
        CHECK(cudaGraphLaunch(replay, stream));
        CHECK(cudaEventRecord(end, stream));
        CHECK(cudaEventSynchronize(end));
        CHECK(cudaEventElapsedTime(&elapsed, begin, end));
        if (i >= 3) times.push_back(elapsed);
    }
    std::sort(times.begin(), times.end());
    CHECK(cudaGraphExecDestroy(replay));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaStreamDestroy(stream));
    return times[times.size() / 2] * 1e3 / calls;
}

/// One shape to time: `batch` sequences of contexts from `least` to `context`, of which the last `rows` positions are
/// computed, in `layers` caches in turn.
struct Load {
    Shape shape;
    uint32_t batch, least, context, rows, layers;
};

/// A load on the device, for one kernel. Pages lie in random order.
struct Loaded {
    Load load;
    Kernel kernel;
    /// Positions of all spans; counted, as the tables are, while the spans are made.
    uint64_t positions = 0;
    std::vector<uint32_t> tables;
    std::vector<AttentionSpan> spans;
    Plan plan;
    uint64_t width, rows;
    DeviceArray<bf16> cache, queries, out;
    DeviceArray<uint32_t> tables_device;
    DeviceArray<AttentionSpan> spans_device;
    DeviceArray<DecodeItem> items;
    DeviceArray<uint32_t> runs;
    DeviceArray<PrefillTile> tiles;
    DeviceArray<AttentionCounts> counts;
    DeviceArray<float> partials;
    DeviceArray<uint32_t> counters;

    Loaded(const Device& device, Kernel which, const Load& with)
        : load(with), kernel(which), spans(make_spans()), plan(with.shape, which, spans, device.run_splits),
          width(uint64_t(with.shape.heads()) * with.shape.head_dim), rows(uint64_t(with.batch) * with.rows),
          cache(layer_elements() * with.layers), queries(rows * width), out(rows * width), tables_device(tables),
          spans_device(plan.spans), items(plan.items), runs(plan.runs), tiles(plan.tiles),
          counts(std::vector<AttentionCounts>{plan.counts()}),
          partials(partial_floats(plan.items.size(), with.shape.heads(), with.shape.head_dim)),
          counters(counter_words(plan.spans.size(), with.shape.kv_heads * parts_of(with.shape.group))) {
        fill_random<<<1024, 256>>>(cache.data, cache.size, 1);
        if (reads_codes(kernel)) make_codes<<<1024, 256>>>(reinterpret_cast<uint32_t*>(cache.data), cache.size / 2);
        fill_random<<<1024, 256>>>(queries.data, queries.size, 7);
        CHECK(cudaMemset(counters.data, 0, counters.size * sizeof(uint32_t)));
        CHECK(cudaMemset(out.data, 0xff, out.size * sizeof(bf16)));
        CHECK(cudaDeviceSynchronize());
    }

    /// Elements of a layer's cache; 8 bits take half of the room.
    uint64_t layer_elements() const {
        const uint64_t all = uint64_t(tables.size()) * 2 * load.shape.kv_heads * PAGE_TOKENS * load.shape.head_dim;
        return reads_codes(kernel) ? all / 2 : all;
    }
    bf16* layer(uint32_t index) const { return cache.data + index % load.layers * layer_elements(); }
    /// Bytes of keys and values that a layer's decode reads.
    double bytes() const {
        return double(positions) * load.shape.kv_heads * load.shape.head_dim * (reads_codes(kernel) ? 2 : 4);
    }

    std::vector<uint16_t> output() const {
        CHECK(cudaDeviceSynchronize());
        std::vector<uint16_t> bits(out.size);
        CHECK(cudaMemcpy(bits.data(), out.data, out.size * sizeof(bf16), cudaMemcpyDeviceToHost));
        return bits;
    }

    void launch_layer(const Device& device, uint32_t index, cudaStream_t stream) const {
        const Shape& shape = load.shape;
        const uint32_t parts = is_decode(kernel) ? parts_of(shape.group) : 1;
        AttentionArguments arguments = {queries.data,       out.data,      layer(index),    spans_device.data,
                                        tables_device.data, items.data,    runs.data,       tiles.data,
                                        counts.data,        partials.data, counters.data,   uint32_t(width),
                                        uint32_t(width),    shape.kv_heads * parts, shape.group / parts,
                                        shape.kv_heads,     parts,         shape.window,
                                        uint32_t(plan.items.size()), 1.44269504f / std::sqrt(float(shape.head_dim)), 1.f};
        launch(device, kernel, shape, arguments, uint32_t(plan.tiles.size()), stream);
    }

  private:
    std::vector<AttentionSpan> make_spans() {
        Random random = {42};
        std::vector<AttentionSpan> made;
        for (uint32_t s = 0; s < load.batch; ++s) {
            const uint32_t context = load.least + random.below(load.context - load.least + 1);
            made.push_back({s * load.rows, load.rows, context, uint32_t(tables.size())});
            for (uint32_t page = 0; page * PAGE_TOKENS < context; ++page) tables.push_back(uint32_t(tables.size()));
            positions += context;
        }
        for (uint32_t i = uint32_t(tables.size()); i > 1; --i) std::swap(tables[i - 1], tables[random.below(i)]);
        return made;
    }
};

inline double time_attention(const Device& device, const Loaded& loaded) {
    return time_us(std::max(loaded.load.layers, 4u),
                   [&](uint32_t i, cudaStream_t stream) { loaded.launch_layer(device, i, stream); });
}

// ---- A chain of products ----

/// What the product before attention writes: the queries, and the pages that hold the last position of each span.
struct Fresh {
    const uint4* queries_from;
    uint4* queries;
    uint64_t queries_count;
    const uint4* pages_from;
    uint4* cache;
    /// Of each page, where it starts in the cache; `page_count` units of 16 bytes of it are written.
    const uint64_t* starts;
    uint32_t starts_count, page_count;
};

/// The dynamic shared memory of a product, and its pieces.
constexpr uint32_t PRODUCT_PIECE = 8 * 1024;
constexpr uint32_t PRODUCT_PIECES = 11;
constexpr uint32_t PRODUCT_THREADS = 160;

/// Stands for a product of a step: streams its share of weights through a ring, which fills before the predecessor has
/// ended, and then runs through much code once. `KIND` makes it other code.
template <int KIND>
__global__ void __launch_bounds__(PRODUCT_THREADS, 2) product(const char* weights, uint32_t pieces, Fresh fresh,
                                                              float* sink) {
    extern __shared__ __align__(1024) unsigned char ring[];
    __shared__ uint64_t full[PRODUCT_PIECES];
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const auto address = [](const void* at) { return uint32_t(__cvta_generic_to_shared(at)); };
    const auto copy = [&](uint32_t piece) {
        const uint32_t barrier = address(&full[piece % PRODUCT_PIECES]);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(PRODUCT_PIECE));
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                address(ring + piece % PRODUCT_PIECES * PRODUCT_PIECE)),
            "l"(weights + (uint64_t(blockIdx.x) * pieces + piece) * PRODUCT_PIECE), "r"(PRODUCT_PIECE), "r"(barrier)
            : "memory");
    };
    if (threadIdx.x == 0) {
        for (uint64_t& barrier : full) asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address(&barrier)));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (threadIdx.x == 0)
        for (uint32_t piece = 0; piece < min(pieces, PRODUCT_PIECES); ++piece) copy(piece);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (threadIdx.x == 0)
        for (uint32_t piece = 0; piece < pieces; ++piece) {
            const uint32_t barrier = address(&full[piece % PRODUCT_PIECES]);
            asm volatile(
                "{\n.reg .pred done;\nagain:\n"
                "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
                "r"(piece / PRODUCT_PIECES % 2)
                : "memory");
            if (piece + PRODUCT_PIECES < pieces) copy(piece + PRODUCT_PIECES);
        }
    __syncthreads();
#endif
    float x[4] = {float(threadIdx.x), 1.f, 2.f, 3.f + KIND};
#pragma unroll
    for (int i = 0; i < 2048; ++i) x[i % 4] = __fmaf_rn(x[i % 4], 1.0001f, x[(i + 1) % 4]);
    if (x[0] + x[1] + x[2] + x[3] == 0.12345f) *sink = x[0];
    const uint32_t all = gridDim.x * PRODUCT_THREADS, thread = blockIdx.x * PRODUCT_THREADS + threadIdx.x;
    for (uint64_t i = thread; i < fresh.queries_count; i += all) fresh.queries[i] = fresh.queries_from[i];
    for (uint64_t i = thread; i < uint64_t(fresh.starts_count) * fresh.page_count; i += all) {
        const uint32_t page = uint32_t(i / fresh.page_count), at = uint32_t(i % fresh.page_count);
        fresh.cache[fresh.starts[page] + at] = fresh.pages_from[uint64_t(page) * fresh.page_count + at];
    }
}

/// Layers of four products, with attention behind the first, as a decode step of a small model has them.
struct Chain {
    static constexpr uint32_t BLOCKS = 64;
    /// Pieces of a block: 8, 4, 12 and 6 MiB of weights.
    static constexpr uint32_t PIECES[4] = {16, 8, 24, 12};
    Loaded& loaded;
    DeviceArray<char> weights;
    DeviceArray<float> sink;
    DeviceArray<bf16> queries;
    std::vector<uint64_t> starts;
    DeviceArray<uint64_t> starts_device;
    /// The last pages of each layer: all of them, or where only times matter a piece as long as what a step writes.
    uint32_t page_count;
    std::vector<DeviceArray<uint4>*> pages;
    cudaStream_t stream;

    Chain(Loaded& of, bool whole)
        : loaded(of), weights(uint64_t(of.load.layers) * layer_bytes()), sink(1), queries(of.queries.size),
          starts(last_pages(of)), starts_device(starts) {
        const uint32_t page_bytes = PAGE_TOKENS * of.load.shape.head_dim * (reads_codes(of.kernel) ? 1 : 2);
        page_count = (whole ? page_bytes : page_bytes / PAGE_TOKENS) / 16;
        CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CHECK(cudaMemset(weights.data, 1, weights.size));
        CHECK(cudaMemcpy(queries.data, of.queries.data, queries.size * sizeof(bf16), cudaMemcpyDeviceToDevice));
        for (uint32_t layer = 0; layer < of.load.layers; ++layer) {
            pages.push_back(new DeviceArray<uint4>(starts.size() * page_count));
            for (size_t i = 0; i < starts.size(); ++i)
                CHECK(cudaMemcpy(pages[layer]->data + i * page_count, place(layer, i), page_count * 16,
                                 cudaMemcpyDeviceToDevice));
        }
    }
    Chain(const Chain&) = delete;
    ~Chain() {
        cudaStreamDestroy(stream);
        for (const DeviceArray<uint4>* page : pages) delete page;
    }

    static constexpr uint64_t layer_bytes() { return uint64_t(BLOCKS) * PRODUCT_PIECE * (16 + 8 + 24 + 12); }

    /// Takes away what the products write.
    void spoil() const {
        CHECK(cudaMemset(loaded.queries.data, 0xff, queries.size * sizeof(bf16)));
        for (uint32_t layer = 0; layer < loaded.load.layers; ++layer)
            for (size_t i = 0; i < starts.size(); ++i) CHECK(cudaMemset(place(layer, i), 0xff, page_count * 16));
        CHECK(cudaMemset(loaded.out.data, 0xff, loaded.out.size * sizeof(bf16)));
        CHECK(cudaDeviceSynchronize());
    }

    void launch_layer(const Device& device, bool attention, uint32_t index, cudaStream_t in) const {
        const uint32_t layer = index % loaded.load.layers;
        const Fresh fresh = {reinterpret_cast<const uint4*>(queries.data),
                             reinterpret_cast<uint4*>(loaded.queries.data),
                             queries.size / 8,
                             pages[layer]->data,
                             reinterpret_cast<uint4*>(loaded.layer(layer)),
                             starts_device.data,
                             uint32_t(starts.size()),
                             page_count};
        const char* from = weights.data + layer * layer_bytes();
        multiply<0>(from, fresh, in);
        if (attention) loaded.launch_layer(device, layer, in);
        multiply<1>(from + BLOCKS * PRODUCT_PIECE * 16, {}, in);
        multiply<2>(from + BLOCKS * PRODUCT_PIECE * 24, {}, in);
        multiply<3>(from + BLOCKS * PRODUCT_PIECE * 48, {}, in);
    }

    double time(const Device& device, bool attention) const {
        return time_us(std::max(loaded.load.layers, 4u),
                       [&](uint32_t i, cudaStream_t in) { launch_layer(device, attention, i, in); });
    }

  private:
    char* place(uint32_t layer, size_t i) const {
        return reinterpret_cast<char*>(loaded.layer(layer)) + starts[i] * 16;
    }

    static std::vector<uint64_t> last_pages(const Loaded& of) {
        const Shape& shape = of.load.shape;
        std::vector<uint64_t> all;
        for (const AttentionSpan& span : of.spans)
            for (uint32_t value = 0; value < 2; ++value)
                for (uint32_t head = 0; head < shape.kv_heads; ++head) {
                    const uint32_t block = of.tables[span.table + (span.context - 1) / PAGE_TOKENS];
                    const uint64_t start = page_start(block, value, shape.kv_heads, head, shape.head_dim);
                    all.push_back(start / (reads_codes(of.kernel) ? 16 : 8));
                }
        return all;
    }

    template <int KIND>
    void multiply(const char* from, const Fresh& fresh, cudaStream_t in) const {
        launch_dependent(product<KIND>, dim3(BLOCKS), PRODUCT_THREADS, PRODUCT_PIECE * PRODUCT_PIECES, in, from,
                         PIECES[KIND], fresh, sink.data);
    }
};
