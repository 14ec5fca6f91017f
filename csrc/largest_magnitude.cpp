#include "largest_magnitude.h"

#include <algorithm>
#include <atomic>

#include "float_types.h"
#include "parallel.h"
#include "status.h"
#include "tiles.h"
#include "vector_clones.h"

// The bits of a magnitude, read as an integer, are ordered as the magnitudes are, NaN above
// infinity.

namespace {

using pyeditfast::kTile;
using pyeditfast::Lines;
using pyeditfast::Tile;
using pyeditfast::Walk;

PYEDITFAST_VECTOR_CLONES
std::uint32_t largest_of_floats(const float* __restrict x, std::int64_t count) {
    std::uint32_t largest = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        largest = std::max(largest, pyeditfast::as_bits(x[i]) & 0x7FFFFFFFu);
    }
    return largest;
}

PYEDITFAST_VECTOR_CLONES
std::uint16_t largest_of_halves(const std::uint16_t* __restrict x, std::int64_t count) {
    std::uint16_t largest = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        largest = std::max(largest, static_cast<std::uint16_t>(x[i] & 0x7FFFu));
    }
    return largest;
}

std::uint32_t largest_of_tile(const Lines& lines, const Tile& tile) {
    if (lines.type == pyeditfast::kFloat32) {
        alignas(64) float buffer[kTile];
        return largest_of_floats(pyeditfast::load_tile(lines, tile, buffer), tile.count);
    }
    alignas(64) std::uint16_t buffer[kTile];
    return largest_of_halves(pyeditfast::load_halves(lines, tile, buffer), tile.count);
}

float as_number(std::uint32_t bits, int type) {
    if (type == pyeditfast::kFloat32) return pyeditfast::as_float(bits);
    const std::uint16_t half = static_cast<std::uint16_t>(bits);
    return type == pyeditfast::kBFloat16 ? pyeditfast::from_bfloat16(half)
                                         : pyeditfast::from_float16(half);
}

}  // namespace

extern "C" int pyeditfast_largest_magnitude(const pyeditfast_matrix* x, std::int64_t rows,
                                            std::int64_t columns, float* out, int threads,
                                            char* message, std::size_t message_size) {
    const pyeditfast::Message failure = {message, message_size};
    int status = pyeditfast::check_sizes(rows, columns, threads, failure);
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix("x", x, rows, columns, false, failure);
    }
    if (status != pyeditfast::kOk) return status;
    if (out == nullptr) {
        return pyeditfast::fail(pyeditfast::kInvalidArgument, failure, "out is a null pointer");
    }
    *out = 0.0f;
    if (rows == 0 || columns == 0) return status;

    Walk walk(rows, columns);
    walk.add(*x);
    walk.finish(false);
    const Lines lines = walk.lines(*x);
    std::atomic<std::uint32_t> largest = 0;
    pyeditfast::parallel_ranges(
        walk.tiles(), threads, pyeditfast::kTilesPerThread,
        [&](int, std::int64_t begin, std::int64_t end) {
            std::uint32_t found = 0;
            for (std::int64_t number = begin; number < end; ++number) {
                found = std::max(found, largest_of_tile(lines, walk.tile(number)));
            }
            std::uint32_t before = largest.load();
            while (before < found && !largest.compare_exchange_weak(before, found)) {
            }
        });
    *out = as_number(largest.load(), x->type);
    return status;
}
