#include "edit_values.h"

#include <algorithm>

#include "parallel.h"
#include "status.h"
#include "sum_of_squares.h"
#include "tiles.h"
#include "vector_clones.h"

namespace {

using pyeditfast::fail;
using pyeditfast::kInvalidArgument;
using pyeditfast::kTile;
using pyeditfast::Lines;
using pyeditfast::Tile;

// Rows that are taken tile by tile together: their tiles share the mean and the scale, which are
// then in the first-level cache.
constexpr std::int64_t kRows = 8;

PYEDITFAST_VECTOR_CLONES
void normalized_squares(float* __restrict lanes, const float* __restrict x,
                        const float* __restrict mean, const float* __restrict scale,
                        std::int64_t count) {
    pyeditfast::square_lanes(lanes, count,
                             [=](std::int64_t i) { return (x[i] - mean[i]) * scale[i]; });
}

PYEDITFAST_VECTOR_CLONES
void normalize_and_weigh(float* __restrict out, const float* __restrict x,
                         const float* __restrict mean, const float* __restrict scale,
                         std::int64_t count, float weight) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = (x[i] - mean[i]) * scale[i] * weight;
}

// Calls body(row - begin, tile) for the tiles of the rows [begin, end), tile by tile.
template <typename Body>
void for_each_tile(std::int64_t begin, std::int64_t end, std::int64_t length, const Body& body) {
    for (std::int64_t first = 0; first < length; first += kTile) {
        for (std::int64_t row = begin; row < end; ++row) {
            body(row - begin, Tile{row, first, std::min(kTile, length - first)});
        }
    }
}

}  // namespace

extern "C" int pyeditfast_edit_values(const pyeditfast_matrix* values,
                                      const pyeditfast_matrix* keys,
                                      const pyeditfast_matrix* grads, const float* mean,
                                      const float* scale, std::int64_t rows, std::int64_t d_in,
                                      std::int64_t d_out, float lr, int threads, char* message,
                                      std::size_t message_size) {
    const pyeditfast::Message failure = {message, message_size};
    int status = pyeditfast::check_sizes(rows, d_in, threads, failure);
    if (status == pyeditfast::kOk) status = pyeditfast::check_sizes(rows, d_out, threads, failure);
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix("keys", keys, rows, d_in, false, failure);
    }
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix("grads", grads, rows, d_out, false, failure);
    }
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix("values", values, rows, d_out, true, failure);
    }
    if (status != pyeditfast::kOk || rows == 0 || d_out == 0) return status;
    if (mean == nullptr || scale == nullptr) {
        return fail(kInvalidArgument, failure, "%s is a null pointer, but has %lld elements",
                    mean == nullptr ? "mean" : "scale", static_cast<long long>(d_in + d_out));
    }

    const Lines key_lines = {keys->data, keys->row_stride, keys->column_stride, keys->type};
    const Lines grad_lines = {grads->data, grads->row_stride, grads->column_stride, grads->type};
    const Lines out = {values->data, values->row_stride, values->column_stride, values->type};
    const auto run = [&](int, std::int64_t begin, std::int64_t end) {
        alignas(64) float loaded[kTile], result[kTile], lanes[pyeditfast::kLanes];
        for (std::int64_t row = begin; row < end; row += kRows) {
            const std::int64_t behind = std::min(row + kRows, end);
            double totals[kRows] = {};
            for_each_tile(row, behind, d_in, [&](std::int64_t number, const Tile& tile) {
                const float* x = pyeditfast::load_tile(key_lines, tile, loaded);
                normalized_squares(lanes, x, mean + tile.begin, scale + tile.begin, tile.count);
                totals[number] += pyeditfast::sum_of_lanes(lanes);
            });
            for_each_tile(row, behind, d_out, [&](std::int64_t number, const Tile& tile) {
                const float* x = pyeditfast::load_tile(grad_lines, tile, loaded);
                float* target = out.in_place(tile);
                if (target == nullptr) target = result;
                normalize_and_weigh(target, x, mean + d_in + tile.begin, scale + d_in + tile.begin,
                                    tile.count, static_cast<float>(totals[number]) * -lr);
                pyeditfast::store_tile(out, tile, target);
            });
        }
    };
    const std::int64_t grain = std::max<std::int64_t>(
        1, pyeditfast::kTilesPerThread * kTile / std::max<std::int64_t>(1, d_in + d_out));
    pyeditfast::parallel_ranges(rows, threads, grain, run);
    return pyeditfast::kOk;
}
