//! Checks and times the attention kernels on the machine's first GPU.
//!
//! `attention check [seed]`   every kernel against f64 on random inputs, and batch invariance byte by byte, bf16 and 8 bits
//! `attention small [seed]`   the same on few and short sequences, for compute-sanitizer
//! `attention decodes [seed]` less than `check`, of decodes above all: both forms, alone and in a chain of kernels
//! `attention time [splits]`  decode against measured bandwidth, with runs of so many splits; decode in a chain of kernels;
//!                            prefill in TFLOP/s. Parts of it: `time-decode`, `time-chain`, `time-prefill`
//!
//! The exit status is 1 if a check fails. Build: see the head of `TUNING-attention.md`.

#include <chrono>

#include "attention_load.cuh"

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
    if (holds) return;
    ++failures;
    std::printf("FAILED: %s\n", what);
}

constexpr Kernel ALL_KERNELS[] = {Kernel::Decode,    Kernel::Runs,    Kernel::Prefill,   Kernel::Wgmma,
                                  Kernel::DecodeFp8, Kernel::RunsFp8, Kernel::PrefillFp8};

/// Compares the spans' rows with f64: the relative error over all of them, and over the worst row and head.
void compare(const Case& batch, const std::vector<uint16_t>& out, const std::vector<AttentionSpan>& spans,
             const std::vector<uint32_t>& sequences, const char* label) {
    struct Row {
        uint32_t s, position;
    };
    std::vector<Row> rows;
    std::vector<bool> written(batch.rows);
    for (size_t i = 0; i < spans.size(); ++i)
        for (uint32_t r = 0; r < spans[i].rows; ++r) {
            written[spans[i].first_row + r] = true;
            // A long prefill is checked at every seventh row and at its ends.
            if (spans[i].rows < 40 || r % 7 == 0 || r + 1 == spans[i].rows)
                rows.push_back({sequences[i], spans[i].context - spans[i].rows + r});
        }
    const uint32_t heads = batch.shape.heads(), dim = batch.shape.head_dim;
    std::vector<double> errors(rows.size() * heads), norms(rows.size() * heads);
    parallel(uint32_t(errors.size()), [&](uint32_t i) {
        const Row row = rows[i / heads];
        const std::vector<double> expected = batch.reference(row.s, row.position, i % heads);
        const uint16_t* got = out.data() + (batch.row_of[row.s] + row.position) * batch.width() + i % heads * dim;
        for (uint32_t d = 0; d < dim; ++d) {
            const double difference = from_bits(got[d]) - expected[d];
            errors[i] += difference * difference;
            norms[i] += expected[d] * expected[d];
        }
    });
    double error = 0, norm = 0, worst = 0;
    for (size_t i = 0; i < errors.size(); ++i) {
        error += errors[i];
        norm += norms[i];
        const double row = std::sqrt(errors[i] / norms[i]);
        if (!(row <= worst)) worst = row;
    }
    error = std::sqrt(error / norm);
    bool outside = true;
    for (uint32_t row = 0; row < batch.rows; ++row)
        for (uint64_t i = 0; i < batch.width() && !written[row]; ++i)
            outside &= out[row * batch.width() + i] == 0xffff;
    const bool good = error < 1e-2 && worst < 3e-2 && outside;
    if (!good || std::getenv("VERBOSE"))
        std::printf("%-8s head %3u group %u kv %u window %4u: error %.2e worst row %.2e%s\n", label,
                    batch.shape.head_dim, batch.shape.group, batch.shape.kv_heads, batch.shape.window, error, worst,
                    outside ? "" : " wrote outside");
    expect(good, label);
}

/// Ragged spans of all sequences: the last row of each for decodes, a random piece of each for prefills.
void check_kernel(const Device& device, const Case& batch, Kernel kernel, Random& random) {
    const std::vector<uint32_t>& lengths = batch.lengths;
    std::vector<AttentionSpan> spans;
    std::vector<uint32_t> sequences;
    for (uint32_t s = 0; s < lengths.size(); ++s) {
        const uint32_t rows = is_decode(kernel) ? 1 : 1 + random.below(lengths[s]);
        const uint32_t first = s % 2 ? lengths[s] - rows : random.below(lengths[s] - rows + 1);
        spans.push_back(batch.span(s, first, rows));
        sequences.push_back(s);
    }
    compare(batch, batch.run(device, kernel, spans, 2), spans, sequences, name_of(kernel));
}

/// Every kernel over numbers of 16 bits, and over numbers of 8.
void check_against_reference(const Device& device, const Shape& shape, const std::vector<uint32_t>& lengths,
                             Random& random) {
    for (const bool codes : {false, true}) {
        const Case batch(shape, lengths, random, random.below(2) ? 1.f : 4.f, codes);
        for (const Kernel kernel : ALL_KERNELS)
            if (exists(kernel, shape.head_dim) && (codes || !reads_codes(kernel)))
                check_kernel(device, batch, kernel, random);
    }
}

/// Bytes of all rows of sequence 0, computed in chunks, beside the batch mates or alone.
std::vector<uint16_t> in_chunks(const Device& device, const Case& batch, Kernel kernel, uint32_t chunk, bool alone) {
    std::vector<uint16_t> all(batch.lengths[0] * batch.width());
    std::vector<std::vector<AttentionSpan>> steps;
    for (uint32_t first = 0; first < batch.lengths[0]; first += chunk) {
        const AttentionSpan span = batch.span(0, first, std::min(chunk, batch.lengths[0] - first));
        // Chunks of one sequence are independent once the cache is filled, so small ones share a launch.
        if (steps.empty() || chunk > 64) steps.emplace_back();
        steps.back().push_back(span);
    }
    for (std::vector<AttentionSpan>& step : steps) {
        const std::vector<AttentionSpan> own = step;
        for (uint32_t s = 1; s < batch.lengths.size() && !alone; ++s)
            step.insert(step.begin() + s % 2 * step.size(), batch.span(s, batch.lengths[s] - 1, 1));
        const std::vector<uint16_t> out = batch.run(device, kernel, step);
        for (const AttentionSpan& span : own)
            std::copy_n(out.begin() + span.first_row * batch.width(), span.rows * batch.width(),
                        all.begin() + (span.first_row - batch.row_of[0]) * batch.width());
    }
    return all;
}

/// Every row of a sequence as decode, in chunks of several sizes, by every kernel, alone and not: equal bytes. Over
/// numbers of 8 bits that holds between the two types of cache, too.
void check_invariance(const Device& device, const Shape& shape, uint32_t length, Random& random, bool codes) {
    const Case batch(shape, {length, 1, 700 % length + 1, length / 2 + 1}, random, 2.f, codes);
    const std::vector<uint16_t> decoded = in_chunks(device, batch, Kernel::Decode, 1, true);
    const auto same = [&](Kernel kernel, uint32_t chunk, bool alone) {
        const std::vector<uint16_t> other = in_chunks(device, batch, kernel, chunk, alone);
        size_t different = 0, first = 0;
        for (size_t i = decoded.size(); i-- > 0;)
            if (decoded[i] != other[i]) ++different, first = i;
        if (different)
            std::printf("head %u group %u window %u length %u, %s in chunks of %u: %zu of %zu elements differ, "
                        "first in row %zu (%04x, %04x)\n",
                        shape.head_dim, shape.group, shape.window, length, name_of(kernel), chunk, different,
                        decoded.size(), size_t(first / batch.width()), decoded[first], other[first]);
        expect(different == 0, "batch invariance");
    };
    same(Kernel::Decode, 1, false);
    if (codes) {
        same(Kernel::DecodeFp8, 1, true);
        same(Kernel::DecodeFp8, 1, false);
    }
    Device crowded = device;
    crowded.decode_grid = 3;
    for (const Kernel kernel : {Kernel::Decode, Kernel::DecodeFp8})
        if (codes || !reads_codes(kernel))
            expect(in_chunks(crowded, batch, kernel, 1, true) == decoded, "decode on three multiprocessors");
    for (const Kernel kernel : {Kernel::Runs, Kernel::RunsFp8}) {
        if (!exists(kernel, shape.head_dim) || (reads_codes(kernel) && !codes)) continue;
        for (const uint32_t splits : {1u, 2u, 8u}) {
            crowded.run_splits = splits;
            expect(in_chunks(crowded, batch, kernel, 1, true) == decoded, "runs on three multiprocessors");
        }
        same(kernel, 1, false);
    }
    for (const Kernel kernel : {Kernel::Prefill, Kernel::Wgmma, Kernel::PrefillFp8}) {
        if (!exists(kernel, shape.head_dim) || (reads_codes(kernel) && !codes)) continue;
        for (const uint32_t chunk : {length, 333u, 64u, 7u, 1u}) same(kernel, chunk, chunk % 2);
    }
}

/// Contexts around and beyond the splits of one run: the same bytes as by the other form.
void check_runs(const Device& device, const Shape& shape, Random& random) {
    const Case batch(shape, {1, 2047, 2048, 2049, 3200}, random, 2.f, true);
    std::vector<AttentionSpan> spans;
    for (uint32_t s = 0; s < batch.lengths.size(); ++s) spans.push_back(batch.span(s, batch.lengths[s] - 1, 1));
    const std::vector<uint16_t> decoded = batch.run(device, Kernel::Decode, spans);
    for (const Kernel kernel : {Kernel::Runs, Kernel::RunsFp8})
        for (const uint32_t splits : {1u, 3u, 4u, 5u, 8u}) {
            Device other = device;
            other.run_splits = splits;
            other.decode_grid = splits % 2 ? 1 : device.multiprocessors;
            if (exists(kernel, shape.head_dim))
                expect(batch.run(other, kernel, spans, 2) == decoded, "runs beyond their splits");
        }
}

/// In a chain of dependent launches, where a product writes queries and last pages a moment before attention: the bytes
/// of attention alone.
void check_chain(const Device& device) {
    for (const Load& load : {Load{{128, 8, 2, 0}, 1, 300, 300, 1, 3}, Load{{64, 2, 3, 200}, 9, 1, 1500, 1, 3},
                             Load{{128, 4, 4, 0}, 70, 1, 900, 1, 2}, Load{{256, 2, 1, 0}, 5, 1, 700, 1, 2}})
        for (const Kernel kernel : {Kernel::Decode, Kernel::Runs, Kernel::DecodeFp8, Kernel::RunsFp8}) {
            if (!exists(kernel, load.shape.head_dim)) continue;
            Loaded loaded(device, kernel, load);
            const Chain chain(loaded, true);
            std::vector<std::vector<uint16_t>> alone;
            for (uint32_t layer = 0; layer < 3; ++layer) {
                loaded.launch_layer(device, layer, chain.stream);
                alone.push_back(loaded.output());
                expect(layer == 0 || alone[layer] != alone[layer - 1], "layers that differ");
            }
            for (uint32_t layers = 1; layers <= 3; ++layers) {
                chain.spoil();
                for (uint32_t layer = 0; layer < layers; ++layer)
                    chain.launch_layer(device, true, layer, chain.stream);
                expect(loaded.output() == alone[layers - 1], "attention behind a product");
            }
        }
}

void check(const Device& device, bool small, Random& random) {
    const std::vector<uint32_t> lengths =
        small ? std::vector<uint32_t>{1, 17, 129, 530}
              : std::vector<uint32_t>{1, 15, 16, 17, 63, 64, 127, 128, 129, 255, 511, 512, 513, 800, 1025, 1537};
    const std::vector<uint32_t> groups = small ? std::vector<uint32_t>{1, 5, 12}
                                               : std::vector<uint32_t>{1, 2, 3, 4, 5, 6, 7, 8, 12};
    for (const uint32_t head_dim : {64u, 96u, 128u, 256u}) {
        for (const uint32_t group : groups) {
            const uint32_t kv_heads = group > GROUP_MAX ? 1 : 1 + random.below(small ? 2 : 3);
            check_against_reference(device, {head_dim, kv_heads, group, 0}, lengths, random);
            if (group % 4 == 1) check_against_reference(device, {head_dim, kv_heads, group, 100}, lengths, random);
            if (group % 4 == 3) check_against_reference(device, {head_dim, kv_heads, group, 640}, lengths, random);
        }
        if (small) {
            check_invariance(device, {head_dim, 1, 3, 0}, 150, random, true);
            continue;
        }
        for (const uint32_t window : {0u, 700u, 2600u}) check_runs(device, {head_dim, 2, 3, window}, random);
        check_invariance(device, {head_dim, 2, 2, 0}, 1337, random, false);
        check_invariance(device, {head_dim, 1, 7, 0}, 1100, random, true);
        check_invariance(device, {head_dim, 2, 3, 200}, 1300, random, true);
    }
    check_chain(device);
}

/// What decodes promise, on fewer shapes than `check`.
void check_decodes(const Device& device, Random& random) {
    const std::vector<uint32_t> lengths = {1, 16, 17, 128, 129, 511, 513, 1025, 1537};
    for (const uint32_t head_dim : {64u, 96u, 128u, 256u}) {
        check_against_reference(device, {head_dim, 2, 1 + random.below(8), 0}, lengths, random);
        for (const uint32_t window : {0u, 700u, 2600u})
            check_runs(device, {head_dim, 2, 1 + random.below(8), window}, random);
    }
    check_chain(device);
}

__global__ void read_all(const uint4* from, uint64_t count, uint32_t* sink) {
    uint32_t folded = 0;
    const uint64_t stride = uint64_t(gridDim.x) * blockDim.x;
    for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < count; i += 4 * stride) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (i + k * stride >= count) break;
            const uint4 v = __ldcs(from + i + k * stride);
            folded ^= v.x ^ v.y ^ v.z ^ v.w;
        }
    }
    if (folded == 0x12345678) *sink = folded;
}

/// What this machine reaches when it only reads, in GB/s; prints it, too.
double read_gbs(const Device& device) {
    const uint64_t bytes = 4ull << 30;
    DeviceArray<bf16> from(bytes / 2);
    DeviceArray<uint32_t> sink(1);
    fill_random<<<1024, 256>>>(from.data, from.size, 3);
    const double us = time_us(2, [&](uint32_t, cudaStream_t stream) {
        read_all<<<device.multiprocessors * 2, 1024, 0, stream>>>(reinterpret_cast<const uint4*>(from.data), bytes / 16,
                                                                  sink.data);
    });
    std::printf("reading alone: %.0f GB/s\n", bytes / us * 1e-3);
    return bytes / us * 1e-3;
}

/// The decode kernels, alone and at the end of a chain of products whose time without attention is taken off.
constexpr Kernel DECODES[] = {Kernel::Decode, Kernel::Runs, Kernel::DecodeFp8, Kernel::RunsFp8};

void print_load(const Load& load) {
    std::printf("%5u %5u to %5u %4u %2u %5u |", load.batch, load.least, load.context, load.shape.head_dim,
                load.shape.kv_heads, load.shape.group);
}

void time_decode(const Device& device, double reading) {
    // Times of FlashAttention 3 in bf16 on an H100, in us; 0 where none was taken.
    const struct {
        Load load;
        double flash3;
    } loads[] = {
        {{{128, 8, 2, 0}, 256, 800, 800, 1, 2}, 299},    {{{128, 8, 4, 0}, 256, 800, 800, 1, 2}, 307},
        {{{128, 8, 2, 0}, 256, 100, 2048, 1, 2}, 0},     {{{128, 8, 4, 0}, 256, 100, 2048, 1, 2}, 0},
        {{{128, 8, 4, 0}, 256, 4096, 4096, 1, 1}, 1373}, {{{128, 8, 4, 0}, 64, 4096, 4096, 1, 2}, 359},
        {{{128, 8, 2, 0}, 128, 100, 2048, 1, 4}, 0},     {{{128, 8, 2, 0}, 64, 100, 2048, 1, 8}, 0},
        {{{128, 8, 2, 0}, 48, 100, 2048, 1, 8}, 0},      {{{128, 8, 2, 0}, 32, 100, 2048, 1, 8}, 0},
        {{{128, 8, 2, 0}, 16, 100, 2048, 1, 16}, 0},     {{{128, 8, 2, 0}, 8, 100, 2048, 1, 28}, 0},
        {{{128, 8, 4, 0}, 1, 4096, 4096, 1, 8}, 38},     {{{128, 8, 2, 0}, 1, 300, 300, 1, 28}, 0},
        {{{64, 3, 3, 0}, 256, 800, 800, 1, 4}, 0},       {{{96, 8, 4, 0}, 256, 800, 800, 1, 2}, 0},
        {{{256, 4, 2, 0}, 256, 800, 800, 1, 2}, 0},      {{{128, 8, 8, 0}, 256, 800, 800, 1, 2}, 0},
    };
    std::printf("decode alone, runs of %u splits: batch, context, head, kv, group | decode us, share of reading | runs |"
                " decode, 8 bits | runs, 8 bits | FlashAttention 3\n",
                device.run_splits);
    for (const auto& [load, flash3] : loads) {
        print_load(load);
        for (const Kernel kernel : DECODES) {
            if (!exists(kernel, load.shape.head_dim)) continue;
            const Loaded loaded(device, kernel, load);
            const double us = time_attention(device, loaded);
            std::printf(" %7.1f %3.0f %% |", us, loaded.bytes() / us * 0.1 / reading);
        }
        if (flash3 > 0) std::printf(" %.0f", flash3);
        std::printf("\n");
    }
}

void time_chain(const Device& device) {
    const Load loads[] = {
        {{128, 8, 2, 0}, 1, 128, 128, 1, 28}, {{128, 8, 2, 0}, 1, 256, 256, 1, 28},
        {{128, 8, 2, 0}, 1, 384, 384, 1, 28}, {{128, 8, 2, 0}, 1, 1000, 1000, 1, 28},
        {{128, 8, 2, 0}, 4, 100, 500, 1, 28}, {{128, 8, 2, 0}, 8, 100, 500, 1, 28},
        {{128, 8, 2, 0}, 32, 100, 2048, 1, 8}, {{128, 8, 2, 0}, 64, 100, 2048, 1, 8},
        {{128, 8, 2, 0}, 256, 800, 800, 1, 4}, {{128, 8, 2, 0}, 256, 100, 2048, 1, 4},
        {{128, 8, 4, 0}, 256, 100, 2048, 1, 4},
    };
    std::printf("in a chain, runs of %u splits: batch, context, head, kv, group | us a layer without attention | and what"
                " is added by decode | runs | decode, 8 bits | runs, 8 bits\n",
                device.run_splits);
    for (const Load& load : loads) {
        print_load(load);
        for (const Kernel kernel : DECODES) {
            Loaded loaded(device, kernel, load);
            const Chain chain(loaded, false);
            const double without = chain.time(device, false);
            if (kernel == DECODES[0]) std::printf(" %7.1f |", without);
            std::printf(" %7.1f |", chain.time(device, true) - without);
        }
        std::printf("\n");
    }
}

void time_prefill(const Device& device) {
    const struct {
        Load load;
        double flash3;
    } loads[] = {
        {{{128, 8, 4, 0}, 4, 4096, 4096, 4096, 1}, 649}, {{{128, 8, 2, 0}, 16, 1024, 1024, 1024, 1}, 394},
        {{{128, 8, 4, 0}, 1, 4096, 4096, 512, 1}, 0},    {{{64, 3, 3, 0}, 16, 1024, 1024, 1024, 1}, 0},
        {{{256, 4, 2, 0}, 4, 2048, 2048, 2048, 1}, 0},
    };
    std::printf("prefill, causal: batch context rows head kv group | mma us TFLOP/s | mma, 8 bits us TFLOP/s |"
                " wgmma us TFLOP/s | FlashAttention 3\n");
    for (const auto& [load, flash3] : loads) {
        const double keys = double(load.rows) * (load.context - load.rows) + 0.5 * load.rows * (load.rows + 1.0);
        const double flops = 4.0 * load.batch * load.shape.heads() * load.shape.head_dim * keys;
        std::printf("                 %5u %7u %4u %4u %2u %5u |", load.batch, load.context, load.rows,
                    load.shape.head_dim, load.shape.kv_heads, load.shape.group);
        for (const Kernel kernel : {Kernel::Prefill, Kernel::PrefillFp8, Kernel::Wgmma}) {
            if (!exists(kernel, load.shape.head_dim)) continue;
            const double us = time_attention(device, Loaded(device, kernel, load));
            std::printf(" %8.1f %5.0f |", us, flops / us * 1e-6);
        }
        if (flash3 > 0) std::printf(" %.0f", flash3);
        std::printf("\n");
    }
}

}  // namespace

int main(int count, char** words) {
    const char* mode = count > 1 ? words[1] : "check";
    const uint64_t seed = count > 2 ? std::strtoull(words[2], nullptr, 10)
                                    : uint64_t(std::chrono::system_clock::now().time_since_epoch().count());
    Device device;
    if (std::strncmp(mode, "time", 4) != 0) {
        Random random = {seed};
        std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
        if (std::strcmp(mode, "decodes") == 0) check_decodes(device, random);
        else check(device, std::strcmp(mode, "small") == 0, random);
        std::printf("%s: %d failures\n", failures ? "FAILED" : "passed", failures);
        return failures ? 1 : 0;
    }
    if (count > 2) device.run_splits = uint32_t(std::strtoul(words[2], nullptr, 10));
    const auto times = [mode](const char* what) { return std::strcmp(mode, "time") == 0 || std::strcmp(mode, what) == 0; };
    if (times("time-decode")) time_decode(device, read_gbs(device));
    if (times("time-chain")) time_chain(device);
    if (times("time-prefill")) time_prefill(device);
    return 0;
}
