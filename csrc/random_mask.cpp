#include "random_mask.h"

#include <cstdint>
#include <limits>

#include "parallel.h"
#include "philox.h"
#include "status.h"

// One build runs on every x86-64 machine and takes its widest vectors: the loader picks the clone.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && \
    (!defined(__clang__) || __clang_major__ >= 14)
#define PYEDITFAST_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define PYEDITFAST_VECTOR_CLONES
#endif

namespace {

// 64K elements take about as long as starting two threads.
constexpr std::int64_t kGrain = std::int64_t{1} << 16;

// A run of consecutive elements whose index has the same upper 32 bits.
struct Run {
    std::uint32_t low;
    std::uint32_t high;
    std::uint32_t k0;
    std::uint32_t k1;
};

PYEDITFAST_VECTOR_CLONES
void fill_uniform(float* __restrict out, std::uint32_t count, Run run) {
    for (std::uint32_t i = 0; i < count; ++i) {
        out[i] = pyeditfast::philox_uniform(run.low + i, run.high, run.k0, run.k1);
    }
}

PYEDITFAST_VECTOR_CLONES
void fill_mask(std::uint8_t* __restrict out, std::uint32_t count, Run run, float ratio) {
    for (std::uint32_t i = 0; i < count; ++i) {
        out[i] = pyeditfast::philox_uniform(run.low + i, run.high, run.k0, run.k1) < ratio ? 1 : 0;
    }
}

// Calls fill(destination, count, run) for the runs of elements [begin, end).
template <typename Value, typename Fill>
void for_each_run(Value* out, std::int64_t begin, std::int64_t end, std::uint64_t seed,
                  std::int64_t offset, const Fill& fill) {
    constexpr std::uint64_t kLongestRun = std::uint64_t{1} << 31;
    constexpr std::uint64_t kSpan = std::uint64_t{1} << 32;
    while (begin < end) {
        const std::uint64_t index = static_cast<std::uint64_t>(offset) + begin;
        const std::uint64_t until_carry = kSpan - (index & (kSpan - 1));
        const std::uint64_t left = static_cast<std::uint64_t>(end - begin);
        const std::uint64_t count = std::min(std::min(left, until_carry), kLongestRun);
        const Run run = {static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(index >> 32),
                         static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
        fill(out + begin, static_cast<std::uint32_t>(count), run);
        begin += static_cast<std::int64_t>(count);
    }
}

int check(const void* out, std::int64_t numel, std::int64_t offset, int threads, char* message,
          std::size_t message_size) {
    using pyeditfast::fail;
    using pyeditfast::kInvalidArgument;
    if (numel < 0) {
        return fail(kInvalidArgument, message, message_size, "numel must be >= 0, got %lld",
                    static_cast<long long>(numel));
    }
    if (out == nullptr && numel > 0) {
        return fail(kInvalidArgument, message, message_size,
                    "out is a null pointer, but numel is %lld", static_cast<long long>(numel));
    }
    if (offset < 0 || offset > std::numeric_limits<std::int64_t>::max() - numel) {
        return fail(kInvalidArgument, message, message_size,
                    "offset must be >= 0 and offset + numel below 2^63, got offset %lld, numel %lld",
                    static_cast<long long>(offset), static_cast<long long>(numel));
    }
    if (threads < 1) {
        return fail(kInvalidArgument, message, message_size, "threads must be >= 1, got %d",
                    threads);
    }
    return pyeditfast::kOk;
}

}  // namespace

extern "C" int pyeditfast_random_uniform(float* out, std::int64_t numel, std::uint64_t seed,
                                         std::int64_t offset, int threads, char* message,
                                         std::size_t message_size) {
    const int status = check(out, numel, offset, threads, message, message_size);
    if (status != pyeditfast::kOk) return status;
    const auto fill_range = [=](std::int64_t begin, std::int64_t end) {
        for_each_run(out, begin, end, seed, offset, fill_uniform);
    };
    return pyeditfast::parallel_ranges(numel, threads, kGrain, fill_range, message, message_size);
}

extern "C" int pyeditfast_random_mask(std::uint8_t* out, std::int64_t numel, std::uint64_t seed,
                                      float ratio, std::int64_t offset, int threads, char* message,
                                      std::size_t message_size) {
    const int status = check(out, numel, offset, threads, message, message_size);
    if (status != pyeditfast::kOk) return status;
    if (!(ratio >= 0.0f && ratio <= 1.0f)) {
        return pyeditfast::fail(pyeditfast::kInvalidArgument, message, message_size,
                                "ratio must be in [0, 1], got %g", static_cast<double>(ratio));
    }
    const auto fill_range = [=](std::int64_t begin, std::int64_t end) {
        for_each_run(out, begin, end, seed, offset,
                     [ratio](std::uint8_t* destination, std::uint32_t count, Run run) {
                         fill_mask(destination, count, run, ratio);
                     });
    };
    return pyeditfast::parallel_ranges(numel, threads, kGrain, fill_range, message, message_size);
}
