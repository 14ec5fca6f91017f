#include "apply_shift.h"

#include <limits>

#include "float_types.h"
#include "parallel.h"
#include "philox.h"
#include "philox_words.h"
#include "status.h"
#include "tiles.h"
#include "vector_clones.h"

namespace {

using pyeditfast::fail;
using pyeditfast::kInvalidArgument;
using pyeditfast::kTile;
using pyeditfast::Lines;
using pyeditfast::Message;
using pyeditfast::Tile;

enum Rounding : int { kNearest = 0, kStochastic = 1, kCompensated = 2 };

PYEDITFAST_VECTOR_CLONES
void add(float* __restrict weight, const float* __restrict shift, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) weight[i] += shift[i];
}

// The value of the 16-bit type that stochastic rounding takes; `convert` and `widen` are its own.
template <typename Convert, typename Widen>
inline float round_stochastically(float exact, std::uint32_t word, const Convert& convert,
                                  const Widen& widen) {
    const std::uint16_t nearest = convert(exact);
    const float back = widen(nearest);
    // Bits without the sign are ordered as magnitudes are: one more is the next number away from 0.
    const bool too_large = (back < 0.0f ? -back : back) > (exact < 0.0f ? -exact : exact);
    const float inner = widen(static_cast<std::uint16_t>(too_large ? nearest - 1 : nearest));
    const float outer = widen(static_cast<std::uint16_t>(too_large ? nearest : nearest + 1));
    const float low = exact < 0.0f ? outer : inner;
    const float high = exact < 0.0f ? inner : outer;
    const float fraction = (exact - low) / (high - low);
    const float rounded = pyeditfast::uniform_float(word) < fraction ? high : low;
    // Infinity and NaN have no neighbours.
    return (back == exact) | (exact != exact) ? back : rounded;
}

PYEDITFAST_VECTOR_CLONES
void round_to_bfloat16(float* __restrict exact, const std::uint32_t* __restrict words,
                       std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        exact[i] = round_stochastically(exact[i], words[i], pyeditfast::to_bfloat16,
                                        pyeditfast::from_bfloat16);
    }
}

PYEDITFAST_VECTOR_CLONES
void round_to_float16(float* __restrict exact, const std::uint32_t* __restrict words,
                      std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        exact[i] = round_stochastically(exact[i], words[i], pyeditfast::to_float16,
                                        pyeditfast::from_float16);
    }
}

PYEDITFAST_VECTOR_CLONES
void compensate_bfloat16(float* __restrict weight, float* __restrict remainder,
                         const float* __restrict shift, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        const float exact = weight[i] + (shift[i] + remainder[i]);
        weight[i] = pyeditfast::from_bfloat16(pyeditfast::to_bfloat16(exact));
        remainder[i] = exact - weight[i];
    }
}

PYEDITFAST_VECTOR_CLONES
void compensate_float16(float* __restrict weight, float* __restrict remainder,
                        const float* __restrict shift, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        const float exact = weight[i] + (shift[i] + remainder[i]);
        weight[i] = pyeditfast::from_float16(pyeditfast::to_float16(exact));
        remainder[i] = exact - weight[i];
    }
}

// What the sum itself loses (Knuth's two-sum), since rounding loses nothing after it.
PYEDITFAST_VECTOR_CLONES
void compensate_float32(float* __restrict weight, float* __restrict remainder,
                        const float* __restrict shift, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        const float before = weight[i];
        const float change = shift[i] + remainder[i];
        const float exact = before + change;
        const float added = exact - before;
        remainder[i] = (before - (exact - added)) + (change - added);
        weight[i] = exact;
    }
}

void compensate(int type, float* weight, float* remainder, const float* shift,
                std::int64_t count) {
    switch (type) {
        case pyeditfast::kBFloat16:
            return compensate_bfloat16(weight, remainder, shift, count);
        case pyeditfast::kFloat16:
            return compensate_float16(weight, remainder, shift, count);
        default:
            return compensate_float32(weight, remainder, shift, count);
    }
}

int check(const pyeditfast_matrix* weight, const pyeditfast_matrix* shift,
          const pyeditfast_matrix* remainder, std::int64_t rows, std::int64_t columns, int rounding,
          std::int64_t offset, int threads, Message message) {
    int status = pyeditfast::check_sizes(rows, columns, threads, message);
    if (status != pyeditfast::kOk) return status;
    if (rounding < kNearest || rounding > kCompensated) {
        return fail(kInvalidArgument, message, "rounding must be from 0 to 2, got %d", rounding);
    }
    status = pyeditfast::check_matrix("weight", weight, rows, columns, true, message);
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix("shift", shift, rows, columns, false, message);
    }
    if (status == pyeditfast::kOk && rounding == kCompensated) {
        status = pyeditfast::check_matrix("remainder", remainder, rows, columns, true, message);
    }
    if (status != pyeditfast::kOk) return status;
    if ((remainder != nullptr) != (rounding == kCompensated)) {
        return fail(kInvalidArgument, message, "a remainder has no meaning for rounding %d",
                    rounding);
    }
    if (rounding == kCompensated && remainder->type != weight->type) {
        return fail(kInvalidArgument, message, "remainder has element type %d and weight %d",
                    remainder->type, weight->type);
    }
    if (rounding == kStochastic && weight->type == pyeditfast::kFloat32) {
        return fail(kInvalidArgument, message,
                    "stochastic rounding is for 16-bit weights; weight has element type %d",
                    weight->type);
    }
    if (offset < 0 || offset > std::numeric_limits<std::int64_t>::max() - rows * columns) {
        return fail(kInvalidArgument, message,
                    "offset must be >= 0 and offset + elements below 2^63, got offset %lld for "
                    "%lld x %lld",
                    static_cast<long long>(offset), static_cast<long long>(rows),
                    static_cast<long long>(columns));
    }
    return pyeditfast::kOk;
}

}  // namespace

extern "C" int pyeditfast_apply_shift(const pyeditfast_matrix* weight,
                                      const pyeditfast_matrix* shift,
                                      const pyeditfast_matrix* remainder, std::int64_t rows,
                                      std::int64_t columns, int rounding, std::uint64_t seed,
                                      std::int64_t offset, int threads, char* message,
                                      std::size_t message_size) {
    const int status = check(weight, shift, remainder, rows, columns, rounding, offset, threads,
                             {message, message_size});
    if (status != pyeditfast::kOk || rows == 0 || columns == 0) return status;

    pyeditfast::Walk walk(rows, columns);
    walk.add(*weight);
    walk.add(*shift);
    if (remainder != nullptr) walk.add(*remainder);
    walk.finish(rounding == kStochastic);
    const Lines weights = walk.lines(*weight);
    const Lines shifts = walk.lines(*shift);
    const Lines remainders = remainder != nullptr ? walk.lines(*remainder) : Lines{};
    const auto round = weight->type == pyeditfast::kBFloat16 ? round_to_bfloat16 : round_to_float16;

    const auto run = [&](int, std::int64_t begin, std::int64_t end) {
        alignas(64) float weight_tile[kTile], shift_tile[kTile], remainder_tile[kTile];
        alignas(64) std::uint32_t words[kTile];
        for (std::int64_t number = begin; number < end; ++number) {
            const Tile tile = walk.tile(number);
            float* values = pyeditfast::load_to_change(weights, tile, weight_tile);
            const float* changes = pyeditfast::load_tile(shifts, tile, shift_tile);
            if (remainder != nullptr) {
                float* lost = pyeditfast::load_to_change(remainders, tile, remainder_tile);
                compensate(weight->type, values, lost, changes, tile.count);
                pyeditfast::store_tile(remainders, tile, lost);
            } else {
                add(values, changes, tile.count);
            }
            if (rounding == kStochastic) {
                pyeditfast::philox_words(
                    words, tile.count, static_cast<std::uint64_t>(offset + walk.first_index(tile)),
                    static_cast<std::uint64_t>(walk.index_step()), seed);
                round(values, words, tile.count);
            }
            pyeditfast::store_tile(weights, tile, values);
        }
    };
    pyeditfast::parallel_ranges(walk.tiles(), threads, pyeditfast::kTilesPerThread, run);
    return pyeditfast::kOk;
}
