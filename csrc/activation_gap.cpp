#include "activation_gap.h"

#include <algorithm>
#include <cmath>

#include "activations.h"
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

#define PYEDITFAST_SQUARES(name, act)                                                              \
    PYEDITFAST_VECTOR_CLONES                                                                       \
    void name(float* __restrict lanes, const float* __restrict main, const float* __restrict side, \
              std::int64_t count) {                                                                \
        pyeditfast::square_lanes(lanes, count,                                                     \
                                 [=](std::int64_t i) { return act(side[i]) - act(main[i]); });     \
    }

inline float identity(float x) { return x; }

PYEDITFAST_SQUARES(identity_squares, identity)
PYEDITFAST_SQUARES(relu_squares, pyeditfast::relu)
PYEDITFAST_SQUARES(silu_squares, pyeditfast::silu)
PYEDITFAST_SQUARES(gelu_squares, pyeditfast::gelu)
PYEDITFAST_SQUARES(gelu_tanh_squares, pyeditfast::gelu_tanh)

using Squares = void (*)(float*, const float*, const float*, std::int64_t);

Squares squares_of(int activation) {
    switch (activation) {
        case pyeditfast::kNoActivation:
            return identity_squares;
        case pyeditfast::kRelu:
            return relu_squares;
        case pyeditfast::kSilu:
            return silu_squares;
        case pyeditfast::kGelu:
            return gelu_squares;
        case pyeditfast::kGeluTanh:
            return gelu_tanh_squares;
        default:
            return nullptr;
    }
}

}  // namespace

extern "C" int pyeditfast_activation_gap(const pyeditfast_matrix* main,
                                         const pyeditfast_matrix* side, std::int64_t tokens,
                                         std::int64_t d_out, int activation, float* gaps,
                                         int threads, char* message, std::size_t message_size) {
    const pyeditfast::Message failure = {message, message_size};
    int status = pyeditfast::check_sizes(tokens, d_out, threads, failure);
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix("main", main, tokens, d_out, false, failure);
    }
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix("side", side, tokens, d_out, false, failure);
    }
    if (status != pyeditfast::kOk) return status;
    if (gaps == nullptr && tokens > 0) {
        return fail(kInvalidArgument, failure, "gaps is a null pointer, but there are %lld tokens",
                    static_cast<long long>(tokens));
    }
    const Squares squares = squares_of(activation);
    if (squares == nullptr) {
        return fail(kInvalidArgument, failure, "activation must be from 0 to 4, got %d",
                    activation);
    }

    const Lines mains = {main->data, main->row_stride, main->column_stride, main->type};
    const Lines sides = {side->data, side->row_stride, side->column_stride, side->type};
    const auto run = [&](int, std::int64_t begin, std::int64_t end) {
        alignas(64) float main_tile[kTile], side_tile[kTile], lanes[pyeditfast::kLanes];
        for (std::int64_t token = begin; token < end; ++token) {
            double total = 0.0;
            for (std::int64_t first = 0; first < d_out; first += kTile) {
                const Tile tile = {token, first, std::min(kTile, d_out - first)};
                const float* from = pyeditfast::load_tile(mains, tile, main_tile);
                const float* to = pyeditfast::load_tile(sides, tile, side_tile);
                squares(lanes, from, to, tile.count);
                total += pyeditfast::sum_of_lanes(lanes);
            }
            gaps[token] = static_cast<float>(std::sqrt(total));
        }
    };
    const std::int64_t grain = std::max<std::int64_t>(
        1, pyeditfast::kTilesPerThread * kTile / std::max<std::int64_t>(1, d_out));
    pyeditfast::parallel_ranges(tokens, threads, grain, run);
    return pyeditfast::kOk;
}
