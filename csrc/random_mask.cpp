#include "random_mask.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "parallel.h"
#include "philox.h"
#include "philox_words.h"
#include "status.h"
#include "vector_clones.h"

namespace {

using pyeditfast::fail;
using pyeditfast::kInvalidArgument;
using pyeditfast::Message;

// 64K elements take about as long as starting a thread.
constexpr std::int64_t kGrain = std::int64_t{1} << 16;

// Words that stay in the first-level cache.
constexpr std::int64_t kWords = 2048;

PYEDITFAST_VECTOR_CLONES
void uniform_from_words(float* __restrict out, const std::uint32_t* __restrict words,
                        std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = pyeditfast::uniform_float(words[i]);
}

PYEDITFAST_VECTOR_CLONES
void mask_from_words(std::uint8_t* __restrict out, const std::uint32_t* __restrict words,
                     std::int64_t count, float ratio) {
    for (std::int64_t i = 0; i < count; ++i) {
        out[i] = pyeditfast::uniform_float(words[i]) < ratio ? 1 : 0;
    }
}

// Calls fill(destination, words, count) for the words of all elements, a few at a time.
template <typename Value, typename Fill>
void fill_from_words(Value* out, std::int64_t numel, std::uint64_t seed, std::int64_t offset,
                     int threads, const Fill& fill) {
    pyeditfast::parallel_ranges(
        numel, threads, kGrain, [=](int, std::int64_t begin, std::int64_t end) {
            std::uint32_t words[kWords];
            for (std::int64_t first = begin; first < end; first += kWords) {
                const std::int64_t count = std::min(kWords, end - first);
                pyeditfast::philox_words(words, count, static_cast<std::uint64_t>(offset + first),
                                         1, seed);
                fill(out + first, words, count);
            }
        });
}

int check(const void* out, std::int64_t numel, std::int64_t offset, int threads,
          Message message) {
    if (numel < 0) {
        return fail(kInvalidArgument, message, "numel must be >= 0, got %lld",
                    static_cast<long long>(numel));
    }
    if (out == nullptr && numel > 0) {
        return fail(kInvalidArgument, message, "out is a null pointer, but numel is %lld",
                    static_cast<long long>(numel));
    }
    if (offset < 0 || offset > std::numeric_limits<std::int64_t>::max() - numel) {
        return fail(kInvalidArgument, message,
                    "offset must be >= 0 and offset + numel below 2^63, "
                    "got offset %lld, numel %lld",
                    static_cast<long long>(offset), static_cast<long long>(numel));
    }
    if (threads < 1) {
        return fail(kInvalidArgument, message, "threads must be >= 1, got %d", threads);
    }
    return pyeditfast::kOk;
}

}  // namespace

extern "C" int pyeditfast_random_uniform(float* out, std::int64_t numel, std::uint64_t seed,
                                         std::int64_t offset, int threads, char* message,
                                         std::size_t message_size) {
    const int status = check(out, numel, offset, threads, {message, message_size});
    if (status != pyeditfast::kOk) return status;
    fill_from_words(out, numel, seed, offset, threads, uniform_from_words);
    return pyeditfast::kOk;
}

extern "C" int pyeditfast_random_mask(std::uint8_t* out, std::int64_t numel, std::uint64_t seed,
                                      float ratio, std::int64_t offset, int threads, char* message,
                                      std::size_t message_size) {
    const int status = check(out, numel, offset, threads, {message, message_size});
    if (status != pyeditfast::kOk) return status;
    if (!(ratio >= 0.0f && ratio <= 1.0f)) {
        return fail(kInvalidArgument, {message, message_size}, "ratio must be in [0, 1], got %g",
                    static_cast<double>(ratio));
    }
    fill_from_words(out, numel, seed, offset, threads,
                    [ratio](std::uint8_t* destination, const std::uint32_t* words,
                            std::int64_t count) {
                        mask_from_words(destination, words, count, ratio);
                    });
    return pyeditfast::kOk;
}
