// The k-th largest magnitude on a CUDA device, by radix select.
//
// The bits of a magnitude, read as an integer, are ordered as the magnitudes are, NaN above
// infinity. A pass counts, among the elements that share the digits settled so far, how many have
// each value of the next digit; then one block finds the digit of the k-th largest. A 16-bit
// element without a base is one digit of 15 bits; a float32 magnitude has digits of 11, 10 and 10.
// Counts are integers, so their order does not matter.
//
// Floor: the matrices read once a pass; for 10^8 bf16 elements 200 MB, 42 us at 4.8 TB/s. Beside it
// every element is an addition in shared memory: at about 5 cycles a warp (32 random elements meet
// in 2 to 4 of the 32 banks) 0.3 of the time of reading 2 bytes on an H200. No GPU has measured it.
#include "magnitude_threshold.h"

#include <algorithm>
#include <cstdio>

#include "device.h"

namespace {

using namespace pyeditfast::device;
using pyeditfast::kBFloat16;
using pyeditfast::kFloat16;
using pyeditfast::kFloat32;
using pyeditfast::kOk;
using pyeditfast::Message;

constexpr std::uint32_t kMagnitudeBits = 0x7FFFFFFFu;
constexpr int kFirstDigit = 11, kFurtherDigit = 10;
constexpr int kWholeDigit = 15;
constexpr int kBinsOfWhole = 1 << kWholeDigit;
constexpr int kMostBins = 1 << kFirstDigit;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
// What a block counts before its counts of 16 bits are added to those of all: a multiple of what
// its threads load at a time.
constexpr std::int64_t kChunk = 7 * 8 * kThreads;
static_assert(kChunk < (1 << 16), "a count of a chunk has 16 bits");

// Copies of the counts of a float32 digit, which has so few values that warps would wait for each
// other. Each warp adds to one.
constexpr int kCopies = 4;

constexpr int kBlocksPerMultiprocessor = 2;

// What is known of the result, and the counts of the pass, all zero between passes.
struct State {
    std::uint64_t remaining;  // The result is the remaining-th largest of those that share digits.
    std::uint32_t digits;
    std::uint32_t unused;
};

// The elements as rows of equal layout. Flat ones lie side by side, at a multiple of 16 bytes.
struct Elements {
    const void* data;
    const void* base;
    std::int64_t row_stride, column_stride;
    std::int64_t base_row_stride, base_column_stride;
    std::int64_t columns;
    std::int64_t count;
    bool flat;
};

template <int type, bool has_base>
DEVICE inline std::uint32_t key_of(typename Element<type>::Stored x,
                                   typename Element<type>::Stored base) {
    if constexpr (type != kFloat32 && !has_base) {
        return x & 0x7FFFu;
    } else {
        const float value = Element<type>::load(x);
        return bits_of(has_base ? value - Element<type>::load(base) : value) & kMagnitudeBits;
    }
}

// Calls visit(key) for the elements of this thread in [begin, end).
template <int type, bool has_base, typename Visit>
DEVICE inline void visit_keys(const Elements& elements, std::int64_t begin, std::int64_t end,
                              const Visit& visit) {
    using Stored = typename Element<type>::Stored;
    constexpr int kLoaded = 16 / sizeof(Stored);
    const Stored* const data = static_cast<const Stored*>(elements.data);
    const Stored* const base = static_cast<const Stored*>(elements.base);
    if (!elements.flat) {
        for (std::int64_t i = begin + thread(); i < end; i += threads()) {
            const std::int64_t row = i / elements.columns, column = i % elements.columns;
            const Stored x = data[row * elements.row_stride + column * elements.column_stride];
            Stored subtracted = 0;
            if (has_base) {
                subtracted = base[row * elements.base_row_stride +
                                  column * elements.base_column_stride];
            }
            visit(key_of<type, has_base>(x, subtracted));
        }
        return;
    }
    const std::int64_t whole = begin + (end - begin) / kLoaded * kLoaded;
    for (std::int64_t i = begin + thread() * kLoaded; i < whole; i += threads() * kLoaded) {
        const Words words = load_16_bytes(data + i);
        Words subtracted = {};
        if (has_base) subtracted = load_16_bytes(base + i);
        UNROLL
        for (int word = 0; word < 4; ++word) {
            if constexpr (type == kFloat32) {
                visit(key_of<type, has_base>(float_of(words.at[word]),
                                             float_of(subtracted.at[word])));
            } else {
                visit(key_of<type, has_base>(static_cast<Stored>(words.at[word]),
                                             static_cast<Stored>(subtracted.at[word])));
                visit(key_of<type, has_base>(static_cast<Stored>(words.at[word] >> 16),
                                             static_cast<Stored>(subtracted.at[word] >> 16)));
            }
        }
    }
    for (std::int64_t i = whole + thread(); i < end; i += threads()) {
        visit(key_of<type, has_base>(data[i], has_base ? base[i] : Stored{}));
    }
}

// Counts 16-bit elements: two counts of a chunk share a word.
template <int type>
KERNEL void LAUNCH_BOUNDS(kThreads, 1) count_whole(Elements elements, std::uint64_t* counts) {
    constexpr int kPairs = kBinsOfWhole / 2;
    SharedMemory memory;
    const Shared<std::uint32_t> pairs = memory.take<std::uint32_t>(kPairs);
    for (int i = thread(); i < kPairs; i += threads()) pairs[i] = 0u;
    barrier();
    for (std::int64_t begin = block_x() * kChunk; begin < elements.count;
         begin += blocks_x() * kChunk) {
        const std::int64_t end =
            begin + kChunk < elements.count ? begin + kChunk : elements.count;
        // Zeros, what an edit left alone, may be most; additions to one place wait for each other.
        std::uint32_t zeros = 0;
        visit_keys<type, false>(elements, begin, end, [&](std::uint32_t key) {
            if (key == 0) {
                ++zeros;
            } else {
                atomic_add(pairs, static_cast<int>(key >> 1), 1u << (key % 2 * 16));
            }
        });
        if (zeros != 0) atomic_add(pairs, 0, zeros);
        barrier();
        for (int i = thread(); i < kPairs; i += threads()) {
            const std::uint32_t pair = pairs[i];
            if (pair == 0) continue;
            if (pair % (1u << 16) != 0) {
                atomic_add(counts + 2 * i, static_cast<std::uint64_t>(pair % (1u << 16)));
            }
            if (pair >> 16 != 0) {
                atomic_add(counts + 2 * i + 1, static_cast<std::uint64_t>(pair >> 16));
            }
            pairs[i] = 0u;
        }
        barrier();
    }
}

// Counts the digit of `bits` bits from bit `shift` on, of the keys whose bits above it are settled.
template <int type, bool has_base>
KERNEL void LAUNCH_BOUNDS(kThreads, 1)
    count_digit(Elements elements, int shift, int bits, const State* state,
                std::uint64_t* counts) {
    SharedMemory memory;
    const int bins = 1 << bits;
    const Shared<std::uint32_t> copies = memory.take<std::uint32_t>(kCopies * bins);
    for (int i = thread(); i < kCopies * bins; i += threads()) copies[i] = 0u;
    barrier();
    const std::uint32_t settled = state->digits;
    const Shared<std::uint32_t> own = copies + warp() % kCopies * bins;
    std::uint32_t zeros = 0;
    for (std::int64_t begin = block_x() * kChunk; begin < elements.count;
         begin += blocks_x() * kChunk) {
        const std::int64_t end =
            begin + kChunk < elements.count ? begin + kChunk : elements.count;
        visit_keys<type, has_base>(elements, begin, end, [&](std::uint32_t key) {
            if (key >> (shift + bits) != settled) return;
            if (key == 0) {
                ++zeros;
            } else {
                atomic_add(own, static_cast<int>((key >> shift) & (bins - 1)), 1u);
            }
        });
    }
    if (zeros != 0) atomic_add(own, 0, zeros);
    barrier();
    for (int i = thread(); i < bins; i += threads()) {
        std::uint64_t total = 0;
        for (int copy = 0; copy < kCopies; ++copy) {
            const std::uint32_t counted = copies[copy * bins + i];
            total += counted;
        }
        if (total != 0) atomic_add(counts + i, total);
    }
}

// Finds the next digit of the result, clears the counts for the next pass, and after the last one
// writes the result. One block; bins are a multiple of the threads, or fewer than them.
template <int type>
KERNEL void LAUNCH_BOUNDS(kThreads, 1)
    select_digit(std::uint64_t k, int bits, bool first, bool last, State* state,
                 std::uint64_t* counts, float* out) {
    SharedMemory memory;
    const Shared<std::uint64_t> of_threads = memory.take<std::uint64_t>(kThreads);
    const Shared<std::uint64_t> of_warps = memory.take<std::uint64_t>(kWarps);
    const int bins = 1 << bits;
    const int share = ceiling_of_division(bins, kThreads);
    const int begin = thread() * share;
    std::uint64_t sum = 0;
    for (int i = 0; i < share && begin + i < bins; ++i) sum += counts[begin + i];
    of_threads[thread()] = sum;
    barrier();
    if (thread() < kWarps) {
        std::uint64_t of_warp = 0;
        for (int i = 0; i < kWarpSize; ++i) {
            const std::uint64_t one = of_threads[thread() * kWarpSize + i];
            of_warp += one;
        }
        of_warps[thread()] = of_warp;
    }
    barrier();
    if (thread() == 0) {
        std::uint64_t remaining = first ? k : state->remaining;
        // From the largest digit down, past whole warps, then threads, then bins.
        int group = kWarps - 1;
        for (; group > 0; --group) {
            const std::uint64_t count = of_warps[group];
            if (remaining <= count) break;
            remaining -= count;
        }
        int member = group * kWarpSize + kWarpSize - 1;
        for (; member > group * kWarpSize; --member) {
            const std::uint64_t count = of_threads[member];
            if (remaining <= count) break;
            remaining -= count;
        }
        int bin = member * share + share - 1;
        for (; bin > member * share; --bin) {
            if (remaining <= counts[bin]) break;
            remaining -= counts[bin];
        }
        const std::uint32_t digits =
            (first ? 0u : state->digits << bits) | static_cast<std::uint32_t>(bin);
        state->digits = digits;
        state->remaining = remaining;
        if (last) {
            if constexpr (type == kFloat32) {
                *out = float_of(digits);
            } else {
                *out = Element<type>::load(static_cast<std::uint16_t>(digits));
            }
        }
    }
    barrier();
    for (int i = thread(); i < bins; i += threads()) counts[i] = 0;
}

struct Select {
    const Elements& elements;
    std::uint64_t k;
    float* out;
    State* state;
    std::uint64_t* counts;
    const pyeditfast_stream& stream;
    Message message;
    const char* sizes;

    Grid blocks() const {
        const std::int64_t chunks = ceiling_of_division(elements.count, kChunk);
        const std::int64_t room = kBlocksPerMultiprocessor * multiprocessors(stream);
        return {std::min(chunks, std::max<std::int64_t>(room, 1))};
    }

    template <int type>
    int select(int bits, bool first, bool last) const {
        constexpr std::size_t kBytes = (kThreads + kWarps) * sizeof(std::uint64_t);
        return launch("magnitude_threshold", sizes, select_digit<type>, Grid{}, kThreads, kBytes,
                      stream, message, k, bits, first, last, state, counts, out);
    }

    template <int type>
    int whole() const {
        constexpr std::size_t kBytes = kBinsOfWhole / 2 * sizeof(std::uint32_t);
        const int status = launch("magnitude_threshold", sizes, count_whole<type>, blocks(),
                                  kThreads, kBytes, stream, message, elements, counts);
        return status == kOk ? select<type>(kWholeDigit, true, true) : status;
    }

    template <int type, bool has_base>
    int digit_by_digit() const {
        int status = kOk;
        for (int shift = 2 * kFurtherDigit; shift >= 0 && status == kOk; shift -= kFurtherDigit) {
            const bool first = shift == 2 * kFurtherDigit;
            const int bits = first ? kFirstDigit : kFurtherDigit;
            const std::size_t bytes = sizeof(std::uint32_t) * kCopies << bits;
            status = launch("magnitude_threshold", sizes, count_digit<type, has_base>, blocks(),
                            kThreads, bytes, stream, message, elements, shift, bits,
                            static_cast<const State*>(state), counts);
            if (status == kOk) status = select<kFloat32>(bits, first, shift == 0);
        }
        return status;
    }

    template <int type>
    int run(bool has_base) const {
        if (has_base) return digit_by_digit<type, true>();
        if constexpr (type == kFloat32) {
            return digit_by_digit<type, false>();
        } else {
            return whole<type>();
        }
    }
};

bool lies_flat(const pyeditfast_matrix& matrix, std::int64_t rows, std::int64_t columns) {
    return (columns == 1 || matrix.column_stride == 1) &&
           (rows == 1 || matrix.row_stride == columns) &&
           reinterpret_cast<std::uintptr_t>(matrix.data) % 16 == 0;
}

pyeditfast_matrix transposed(const pyeditfast_matrix& matrix) {
    return {matrix.data, matrix.column_stride, matrix.row_stride, matrix.type};
}

// Of a set the order does not matter: of a transposed matrix the columns are the rows.
Elements elements_of(pyeditfast_matrix x, const pyeditfast_matrix* base, std::int64_t rows,
                     std::int64_t columns) {
    pyeditfast_matrix b = base != nullptr ? *base : x;
    if (x.row_stride < x.column_stride) {
        x = transposed(x);
        b = transposed(b);
        std::swap(rows, columns);
    }
    const bool flat = lies_flat(x, rows, columns) && lies_flat(b, rows, columns);
    return {x.data,
            base != nullptr ? b.data : nullptr,
            x.row_stride,
            x.column_stride,
            b.row_stride,
            b.column_stride,
            columns,
            rows * columns,
            flat};
}

}  // namespace

extern "C" std::int64_t pyeditfast_cuda_magnitude_threshold_workspace(int type, bool has_base) {
    const int bins = type == kFloat32 || has_base ? kMostBins : kBinsOfWhole;
    return static_cast<std::int64_t>(sizeof(State) +
                                     static_cast<std::size_t>(bins) * sizeof(std::uint64_t));
}

extern "C" int pyeditfast_cuda_magnitude_threshold(
    const pyeditfast_matrix* x, const pyeditfast_matrix* base, std::int64_t rows,
    std::int64_t columns, std::int64_t k, float* out, void* workspace, pyeditfast_stream stream,
    char* message_text, std::size_t message_size) {
    const Message message = {message_text, message_size};
    int status = pyeditfast::check_magnitude_threshold(x, base, rows, columns, k, out, 1, message);
    if (status != kOk) return status;
    if (base != nullptr && base->type != x->type) {
        return pyeditfast::fail(pyeditfast::kInvalidArgument, message,
                                "base has element type %d, x has %d", base->type, x->type);
    }
    if (workspace == nullptr || reinterpret_cast<std::uintptr_t>(workspace) % 8 != 0) {
        return pyeditfast::fail(pyeditfast::kInvalidArgument, message,
                                "workspace is at %p; a multiple of 8 is needed", workspace);
    }
    char sizes[80];
    std::snprintf(sizes, sizeof sizes, "%lld x %lld elements", static_cast<long long>(rows),
                  static_cast<long long>(columns));
    const auto bytes = static_cast<std::size_t>(
        pyeditfast_cuda_magnitude_threshold_workspace(x->type, base != nullptr));
    status = fill_with_zeros("magnitude_threshold", sizes, workspace, bytes, stream, message);
    if (status != kOk) return status;
    const Elements elements = elements_of(*x, base, rows, columns);
    State* const state = static_cast<State*>(workspace);
    const Select select = {elements,
                           static_cast<std::uint64_t>(k),
                           out,
                           state,
                           reinterpret_cast<std::uint64_t*>(state + 1),
                           stream,
                           message,
                           sizes};
    if (x->type == kBFloat16) return select.run<kBFloat16>(base != nullptr);
    if (x->type == kFloat16) return select.run<kFloat16>(base != nullptr);
    return select.run<kFloat32>(base != nullptr);
}
