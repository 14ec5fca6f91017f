#include "apply_shift.h"

#include <algorithm>

#include "float16_arrays.h"
#include "float_types.h"
#include "parallel.h"
#include "philox.h"
#include "status.h"
#include "tile_words.h"
#include "tiles.h"
#include "vector_clones.h"

namespace {

using pyeditfast::fail;
using pyeditfast::kInvalidArgument;
using pyeditfast::kTile;
using pyeditfast::Lines;
using pyeditfast::Message;
using pyeditfast::Tile;
using pyeditfast::Walk;

enum Rounding : int { kNearest = 0, kStochastic = 1, kCompensated = 2 };

PYEDITFAST_VECTOR_CLONES
void add_float32(float* __restrict weight, const float* __restrict shift, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) weight[i] += shift[i];
}

// The 16-bit number that stochastic rounding takes; `convert` and `widen` are those of its type.
template <typename Convert, typename Widen>
inline std::uint16_t round_stochastically(float exact, std::uint32_t word, const Convert& convert,
                                          const Widen& widen) {
    const std::uint16_t nearest = convert(exact);
    const float back = widen(nearest);
    // Bits without the sign are ordered as magnitudes are: one more is the next number away from 0.
    const bool too_large = (back < 0.0f ? -back : back) > (exact < 0.0f ? -exact : exact);
    const auto inner = static_cast<std::uint16_t>(too_large ? nearest - 1 : nearest);
    const auto outer = static_cast<std::uint16_t>(too_large ? nearest : nearest + 1);
    const std::uint16_t low = exact < 0.0f ? outer : inner;
    const std::uint16_t high = exact < 0.0f ? inner : outer;
    const float fraction = (exact - widen(low)) / (widen(high) - widen(low));
    const std::uint16_t rounded = pyeditfast::uniform_float(word) < fraction ? high : low;
    // Infinity and NaN have no neighbours.
    return (back == exact) | (exact != exact) ? nearest : rounded;
}

// The same for bfloat16, whose numbers are float32's without the lower half: what that half holds
// is the fraction, without a division.
inline std::uint16_t round_to_bfloat16(float exact, std::uint32_t word) {
    const std::uint32_t bits = pyeditfast::as_bits(exact);
    const bool negative = exact < 0.0f;
    const float outward = static_cast<float>(static_cast<std::int32_t>(bits & 0xFFFFu)) / 65536.0f;
    const float upward = negative ? 1.0f - outward : outward;
    // Beyond the largest number the distance to the next one, infinity, is infinite.
    const bool beyond = (bits & 0x7FFFFFFFu) > 0x7F7F0000u;
    const float fraction = beyond ? 0.0f : upward;
    const bool up = pyeditfast::uniform_float(word) < fraction;
    const std::uint32_t rounded = bits + (up != negative ? 0x10000u : 0u);
    const std::uint32_t kept = (bits & 0xFFFFu) == 0 ? bits : rounded;
    return static_cast<std::uint16_t>((exact != exact ? bits | 0x00400000u : kept) >> 16);
}

inline std::uint16_t round_to_float16(float exact, std::uint32_t word) {
    return round_stochastically(exact, word, pyeditfast::to_float16, pyeditfast::from_float16);
}

// Weights of 16 bits are converted, changed and rounded in one loop, which is what keeps up with
// memory.
#define PYEDITFAST_ADD_STOCHASTICALLY(type)                                                       \
    PYEDITFAST_VECTOR_CLONES                                                                      \
    void add_stochastically_##type(std::uint16_t* __restrict weight,                              \
                                   const float* __restrict shift,                                 \
                                   const std::uint32_t* __restrict words, std::int64_t count) {   \
        for (std::int64_t i = 0; i < count; ++i) {                                                \
            weight[i] = round_to_##type(pyeditfast::from_##type(weight[i]) + shift[i], words[i]); \
        }                                                                                         \
    }

PYEDITFAST_ADD_STOCHASTICALLY(bfloat16)
PYEDITFAST_ADD_STOCHASTICALLY(float16)

PYEDITFAST_VECTOR_CLONES
void add_bfloat16(std::uint16_t* __restrict weight, const float* __restrict shift,
                  std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        weight[i] = pyeditfast::to_bfloat16(pyeditfast::from_bfloat16(weight[i]) + shift[i]);
    }
}

PYEDITFAST_VECTOR_CLONES
void compensate_bfloat16(std::uint16_t* __restrict weight, std::uint16_t* __restrict remainder,
                         const float* __restrict shift, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        const float change = shift[i] + pyeditfast::from_bfloat16(remainder[i]);
        const float exact = pyeditfast::from_bfloat16(weight[i]) + change;
        weight[i] = pyeditfast::to_bfloat16(exact);
        remainder[i] = pyeditfast::to_bfloat16(exact - pyeditfast::from_bfloat16(weight[i]));
    }
}

// Those of float16 take turns with the processor's own conversion, of up to kTile numbers.
void add_float16(std::uint16_t* weight, const float* shift, std::int64_t count) {
    alignas(64) float exact[kTile];
    pyeditfast::widen_float16(exact, weight, count);
    add_float32(exact, shift, count);
    pyeditfast::narrow_to_float16(weight, exact, count);
}

PYEDITFAST_VECTOR_CLONES
void add_both(float* __restrict weight, const float* __restrict remainder,
              const float* __restrict shift, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) weight[i] += shift[i] + remainder[i];
}

PYEDITFAST_VECTOR_CLONES
void subtract(float* __restrict exact, const float* __restrict rounded, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) exact[i] -= rounded[i];
}

void compensate_float16(std::uint16_t* weight, std::uint16_t* remainder, const float* shift,
                        std::int64_t count) {
    alignas(64) float exact[kTile], other[kTile];
    pyeditfast::widen_float16(exact, weight, count);
    pyeditfast::widen_float16(other, remainder, count);
    add_both(exact, other, shift, count);
    pyeditfast::narrow_to_float16(weight, exact, count);
    pyeditfast::widen_float16(other, weight, count);
    subtract(exact, other, count);
    pyeditfast::narrow_to_float16(remainder, exact, count);
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

// The matrices along their walk.
struct Input {
    const Walk& walk;
    Lines weights;
    Lines shifts;
    Lines remainders;
    int rounding;
    std::uint64_t seed;
    std::int64_t offset;
};

void add_to_floats(const Input& input, std::int64_t begin, std::int64_t end) {
    alignas(64) float weight_tile[kTile], shift_tile[kTile], remainder_tile[kTile];
    for (std::int64_t number = begin; number < end; ++number) {
        const Tile tile = input.walk.tile(number);
        float* weight = pyeditfast::load_to_change(input.weights, tile, weight_tile);
        const float* shift = pyeditfast::load_tile(input.shifts, tile, shift_tile);
        if (input.rounding == kCompensated) {
            float* remainder = pyeditfast::load_to_change(input.remainders, tile, remainder_tile);
            compensate_float32(weight, remainder, shift, tile.count);
            pyeditfast::store_tile(input.remainders, tile, remainder);
        } else {
            add_float32(weight, shift, tile.count);
        }
        pyeditfast::store_tile(input.weights, tile, weight);
    }
}

// Calls body(first, count) for parts of a tile, and asks for what lies a little ahead: the
// processor's own foresight is too slow for matrices whose elements differ in size.
template <typename Body>
void for_each_part(const Input& input, const Tile& tile, const Body& body) {
    constexpr std::int64_t kPart = 128, kAhead = 256;
    for (std::int64_t first = 0; first < tile.count; first += kPart) {
        const std::int64_t count = std::min(kPart, tile.count - first);
        const Tile ahead = {tile.line, tile.begin + first + kAhead, count};
        pyeditfast::prefetch_tile(input.weights, ahead);
        pyeditfast::prefetch_tile(input.shifts, ahead);
        pyeditfast::prefetch_tile(input.remainders, ahead);
        body(first, count);
    }
}

void add_to_halves(const Input& input, std::int64_t begin, std::int64_t end) {
    const bool bfloat16 = input.weights.type == pyeditfast::kBFloat16;
    const auto add = bfloat16 ? add_bfloat16 : add_float16;
    const auto add_stochastically =
        bfloat16 ? add_stochastically_bfloat16 : add_stochastically_float16;
    const auto compensate = bfloat16 ? compensate_bfloat16 : compensate_float16;
    alignas(64) std::uint16_t weight_tile[kTile], remainder_tile[kTile];
    alignas(64) float shift_tile[kTile];
    alignas(64) std::uint32_t words[kTile];
    for (std::int64_t number = begin; number < end; ++number) {
        const Tile tile = input.walk.tile(number);
        std::uint16_t* weight = pyeditfast::load_halves(input.weights, tile, weight_tile);
        const float* shift = pyeditfast::load_tile(input.shifts, tile, shift_tile);
        if (input.rounding == kCompensated) {
            std::uint16_t* remainder =
                pyeditfast::load_halves(input.remainders, tile, remainder_tile);
            for_each_part(input, tile, [=](std::int64_t first, std::int64_t count) {
                compensate(weight + first, remainder + first, shift + first, count);
            });
            pyeditfast::store_halves(input.remainders, tile, remainder);
        } else if (input.rounding == kStochastic) {
            pyeditfast::tile_words(words, input.walk, tile, input.offset, input.seed,
                                   {input.weights, input.shifts});
            add_stochastically(weight, shift, words, tile.count);
        } else {
            for_each_part(input, tile, [=](std::int64_t first, std::int64_t count) {
                add(weight + first, shift + first, count);
            });
        }
        pyeditfast::store_halves(input.weights, tile, weight);
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
    return pyeditfast::check_offset(offset, rows, columns, message);
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

    Walk walk(rows, columns);
    walk.add(*weight);
    walk.add(*shift);
    if (remainder != nullptr) walk.add(*remainder);
    walk.finish(rounding == kStochastic);
    const Input input = {walk,
                         walk.lines(*weight),
                         walk.lines(*shift),
                         remainder != nullptr ? walk.lines(*remainder) : Lines{},
                         rounding,
                         seed,
                         offset};
    const auto add = weight->type == pyeditfast::kFloat32 ? add_to_floats : add_to_halves;
    pyeditfast::parallel_ranges(
        walk.tiles(), threads, pyeditfast::kTilesPerThread,
        [&](int, std::int64_t begin, std::int64_t end) { add(input, begin, end); });
    return pyeditfast::kOk;
}
