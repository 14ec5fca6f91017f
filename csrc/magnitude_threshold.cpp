#include "magnitude_threshold.h"

#include <memory>
#include <new>

#include "float_types.h"
#include "parallel.h"
#include "status.h"
#include "tiles.h"
#include "vector_clones.h"

// The bits of a magnitude, read as an integer, are ordered as the magnitudes are, NaN above
// infinity. The first pass counts the elements of every value of the upper 16 bits, which settles
// those bits of the result; the second counts the lower 15 bits of the elements that share them.

namespace {

using pyeditfast::fail;
using pyeditfast::kInvalidArgument;
using pyeditfast::kTile;
using pyeditfast::Lines;
using pyeditfast::Message;
using pyeditfast::Tile;
using pyeditfast::Walk;

constexpr std::uint32_t kMagnitudeBits = 0x7FFFFFFFu;
constexpr int kLowerBits = 15;
constexpr std::uint32_t kUpperBins = 1u << 16;
constexpr std::uint32_t kLowerBins = 1u << kLowerBits;

// Elements that are looked at one by one only if one of them counts.
constexpr std::int64_t kBlock = 64;
constexpr std::int64_t kBlocks = kTile / kBlock;

// Counts that are increased one after the other wait for each other, and zeros (what an edit left
// alone) are many. So zeros, and what the second pass ignores, take turns at several places.
constexpr std::uint32_t kTurns = 16;

PYEDITFAST_VECTOR_CLONES
void magnitude_bits(std::uint32_t* __restrict keys, const float* __restrict x, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        keys[i] = pyeditfast::as_bits(x[i]) & kMagnitudeBits;
    }
}

PYEDITFAST_VECTOR_CLONES
void difference_bits(std::uint32_t* __restrict keys, const float* __restrict x,
                     const float* __restrict base, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        keys[i] = pyeditfast::as_bits(x[i] - base[i]) & kMagnitudeBits;
    }
}

// bins[i] = where the first pass counts key i; zeros behind all bins.
PYEDITFAST_VECTOR_CLONES
void upper_bins(std::uint32_t* __restrict bins, const std::uint32_t* __restrict keys,
                std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint32_t zero = kUpperBins + static_cast<std::uint32_t>(i) % kTurns;
        bins[i] = keys[i] == 0 ? zero : keys[i] >> kLowerBits;
    }
}

// bins[i] = where the second pass counts key i of a block; zeros behind all bins, then what is not
// in [low, low + kLowerBins).
PYEDITFAST_VECTOR_CLONES
void lower_bins(std::uint32_t* __restrict bins, const std::uint32_t* __restrict keys,
                std::uint32_t low) {
    for (std::uint32_t i = 0; i < kBlock; ++i) {
        const std::uint32_t zero = kLowerBins + i % kTurns;
        const std::uint32_t bin = keys[i] - low;
        const std::uint32_t counted = keys[i] == 0 ? zero : bin;
        bins[i] = bin < kLowerBins ? counted : zero + kTurns;
    }
}

// matches[b] = how many keys of block b lie in [low, low + kLowerBins).
PYEDITFAST_VECTOR_CLONES
void count_matches(std::uint32_t* __restrict matches, const std::uint32_t* __restrict keys,
                   std::uint32_t low) {
    for (std::int64_t block = 0; block < kBlocks; ++block) {
        std::uint32_t count = 0;
        for (std::int64_t i = 0; i < kBlock; ++i) {
            count += keys[block * kBlock + i] - low < kLowerBins ? 1 : 0;
        }
        matches[block] = count;
    }
}

// What all passes read.
struct Input {
    const Walk& walk;
    Lines x;
    Lines base;
    bool has_base;

    void load_keys(const Tile& tile, std::uint32_t* keys) const {
        alignas(64) float x_tile[kTile], base_tile[kTile];
        const float* values = pyeditfast::load_tile(x, tile, x_tile);
        if (has_base) {
            const float* bases = pyeditfast::load_tile(base, tile, base_tile);
            difference_bits(keys, values, bases, tile.count);
        } else {
            magnitude_bits(keys, values, tile.count);
        }
    }
};

// Bins for every worker, with places for zeros and for what is ignored behind them.
class Counts {
public:
    Counts(int workers, std::uint32_t bins)
        : workers_(workers),
          bins_(bins),
          counts_(new(std::nothrow) std::uint64_t[stride() * static_cast<std::size_t>(workers)]()) {
    }

    bool allocated() const { return counts_ != nullptr; }
    std::uint64_t* of(int worker) { return counts_.get() + stride() * worker; }

    // Returns the bin of the k-th element from the top, and takes from k what lies in higher bins.
    // Zeros, where there are any, lie in bin 0, which needs no count.
    std::uint32_t bin_of(std::int64_t& k) const {
        for (std::uint32_t bin = bins_ - 1; bin > 0; --bin) {
            std::int64_t count = 0;
            for (int worker = 0; worker < workers_; ++worker) {
                count += static_cast<std::int64_t>(counts_[stride() * worker + bin]);
            }
            if (k <= count) return bin;
            k -= count;
        }
        return 0;
    }

private:
    std::size_t stride() const { return std::size_t{bins_} + 2 * kTurns; }

    int workers_;
    std::uint32_t bins_;
    std::unique_ptr<std::uint64_t[]> counts_;
};

void count_upper(const Input& input, std::int64_t begin, std::int64_t end, std::uint64_t* bins) {
    alignas(64) std::uint32_t keys[kTile], places[kTile];
    for (std::int64_t number = begin; number < end; ++number) {
        const Tile tile = input.walk.tile(number);
        input.load_keys(tile, keys);
        upper_bins(places, keys, tile.count);
        for (std::int64_t i = 0; i < tile.count; ++i) ++bins[places[i]];
    }
}

void count_lower(const Input& input, std::int64_t begin, std::int64_t end, std::uint32_t low,
                 std::uint64_t* bins) {
    alignas(64) std::uint32_t keys[kTile];
    alignas(64) std::uint32_t places[kBlock], matches[kBlocks];
    for (std::int64_t number = begin; number < end; ++number) {
        const Tile tile = input.walk.tile(number);
        input.load_keys(tile, keys);
        for (std::int64_t i = tile.count; i < kTile; ++i) keys[i] = low - 1;
        count_matches(matches, keys, low);
        for (std::int64_t block = 0; block < kBlocks; ++block) {
            if (matches[block] == 0) continue;
            lower_bins(places, keys + block * kBlock, low);
            for (std::int64_t i = 0; i < kBlock; ++i) ++bins[places[i]];
        }
    }
}

// Numbers of 16 bits: one pass settles all of them.
void count_halves(const Input& input, std::int64_t begin, std::int64_t end, std::uint64_t* bins) {
    const Lines& lines = input.x;
    for (std::int64_t number = begin; number < end; ++number) {
        const Tile tile = input.walk.tile(number);
        const std::uint16_t* values = static_cast<const std::uint16_t*>(lines.data) +
                                      tile.line * lines.line_stride +
                                      tile.begin * lines.element_stride;
        for (std::int64_t i = 0; i < tile.count; ++i) {
            const std::uint32_t key = values[i * lines.element_stride] & 0x7FFFu;
            ++bins[key != 0 ? key : kUpperBins + static_cast<std::uint32_t>(i) % kTurns];
        }
    }
}

}  // namespace

namespace pyeditfast {

int check_magnitude_threshold(const pyeditfast_matrix* x, const pyeditfast_matrix* base,
                              std::int64_t rows, std::int64_t columns, std::int64_t k,
                              const float* out, int threads, Message message) {
    int status = check_sizes(rows, columns, threads, message);
    if (status == kOk) {
        status = check_matrix("x", x, rows, columns, false, message);
    }
    if (status == kOk && base != nullptr) {
        status = check_matrix("base", base, rows, columns, false, message);
    }
    if (status != kOk) return status;
    if (k < 1 || k > rows * columns) {
        return fail(kInvalidArgument, message,
                    "k must be from 1 to the number of elements, got %lld for %lld x %lld",
                    static_cast<long long>(k), static_cast<long long>(rows),
                    static_cast<long long>(columns));
    }
    if (out == nullptr) return fail(kInvalidArgument, message, "out is a null pointer");
    return kOk;
}

}  // namespace pyeditfast

extern "C" int pyeditfast_magnitude_threshold(const pyeditfast_matrix* x,
                                              const pyeditfast_matrix* base, std::int64_t rows,
                                              std::int64_t columns, std::int64_t k, float* out,
                                              int threads, char* message,
                                              std::size_t message_size) {
    const int status = pyeditfast::check_magnitude_threshold(x, base, rows, columns, k, out,
                                                             threads, {message, message_size});
    if (status != pyeditfast::kOk) return status;

    Walk walk(rows, columns);
    walk.add(*x);
    if (base != nullptr) walk.add(*base);
    walk.finish(false);
    const Input input = {walk, walk.lines(*x), base != nullptr ? walk.lines(*base) : Lines{},
                         base != nullptr};

    const std::int64_t tiles = walk.tiles();
    const int workers = pyeditfast::worker_count(tiles, threads, pyeditfast::kTilesPerThread);
    Counts counts(workers, kUpperBins);
    Counts lower_counts(workers, kLowerBins);
    if (!counts.allocated() || !lower_counts.allocated()) {
        return fail(pyeditfast::kSystemError, {message, message_size},
                    "no memory for the counts of %d threads", workers);
    }
    const bool halves = base == nullptr && x->type != pyeditfast::kFloat32;
    pyeditfast::parallel_ranges(tiles, threads, pyeditfast::kTilesPerThread,
                                [&](int worker, std::int64_t begin, std::int64_t end) {
                                    const auto count = halves ? count_halves : count_upper;
                                    count(input, begin, end, counts.of(worker));
                                });
    const std::uint32_t upper = counts.bin_of(k);
    if (halves) {
        std::uint16_t half = static_cast<std::uint16_t>(upper);
        const Lines one = {&half, 0, 1, x->type};
        pyeditfast::load_tile(one, {0, 0, 1}, out);
        return pyeditfast::kOk;
    }

    const std::uint32_t low = upper << kLowerBits;
    pyeditfast::parallel_ranges(tiles, threads, pyeditfast::kTilesPerThread,
                                [&](int worker, std::int64_t begin, std::int64_t end) {
                                    count_lower(input, begin, end, low, lower_counts.of(worker));
                                });
    *out = pyeditfast::as_float(low | lower_counts.bin_of(k));
    return pyeditfast::kOk;
}
