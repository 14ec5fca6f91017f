#include "ties_merge.h"

#include <cmath>
#include <memory>
#include <new>

#include "parallel.h"
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

// delta = what is kept of side - main; total += weight * delta.
PYEDITFAST_VECTOR_CLONES
void trim(float* __restrict delta, float* __restrict total, const float* __restrict side,
          const float* __restrict main, std::int64_t count, float threshold, float weight) {
    for (std::int64_t i = 0; i < count; ++i) {
        const float difference = side[i] - main[i];
        const float kept = std::fabs(difference) >= threshold ? difference : 0.0f;
        delta[i] = kept;
        total[i] += weight * kept;
    }
}

// Adds the deltas that have the elected sign, and their weight.
PYEDITFAST_VECTOR_CLONES
void add_agreeing(float* __restrict sum, float* __restrict share, const float* __restrict delta,
                  const float* __restrict total, std::int64_t count, float weight) {
    for (std::int64_t i = 0; i < count; ++i) {
        const bool positive = total[i] >= 0.0f;
        const bool agrees = (positive & (delta[i] > 0.0f)) | (!positive & (delta[i] < 0.0f));
        const float product = weight * delta[i];
        sum[i] += agrees ? product : 0.0f;
        share[i] += agrees ? weight : 0.0f;
    }
}

PYEDITFAST_VECTOR_CLONES
void add_average(float* __restrict out, const float* __restrict main, const float* __restrict sum,
                 const float* __restrict share, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
        const float divisor = share[i] == 0.0f ? 1.0f : share[i];
        out[i] = main[i] + sum[i] / divisor;
    }
}

void clear(float* values, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) values[i] = 0.0f;
}

int check(const pyeditfast_matrix* out, const pyeditfast_matrix* main,
          const pyeditfast_matrix* sides, const float* thresholds, const float* weights,
          std::int64_t side_count, std::int64_t rows, std::int64_t columns, int threads,
          Message message) {
    int status = pyeditfast::check_sizes(rows, columns, threads, message);
    if (status != pyeditfast::kOk) return status;
    if (side_count < 1 || side_count > (std::int64_t{1} << 20)) {
        return fail(kInvalidArgument, message, "1 to 2^20 sides are needed, got %lld",
                    static_cast<long long>(side_count));
    }
    if (sides == nullptr || thresholds == nullptr || weights == nullptr) {
        return fail(kInvalidArgument, message, "%s is a null pointer, but there are %lld sides",
                    sides == nullptr        ? "sides"
                    : thresholds == nullptr ? "thresholds"
                                            : "weights",
                    static_cast<long long>(side_count));
    }
    status = pyeditfast::check_matrix("out", out, rows, columns, true, message);
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix("main", main, rows, columns, false, message);
    }
    for (std::int64_t side = 0; side < side_count && status == pyeditfast::kOk; ++side) {
        char name[32];
        std::snprintf(name, sizeof name, "sides[%lld]", static_cast<long long>(side));
        status = pyeditfast::check_matrix(name, &sides[side], rows, columns, false, message);
    }
    return status;
}

}  // namespace

extern "C" int pyeditfast_ties_merge(const pyeditfast_matrix* out, const pyeditfast_matrix* main,
                                     const pyeditfast_matrix* sides, const float* thresholds,
                                     const float* weights, std::int64_t side_count,
                                     std::int64_t rows, std::int64_t columns, int threads,
                                     char* message, std::size_t message_size) {
    const int status = check(out, main, sides, thresholds, weights, side_count, rows, columns,
                             threads, {message, message_size});
    if (status != pyeditfast::kOk || rows == 0 || columns == 0) return status;

    pyeditfast::Walk walk(rows, columns);
    walk.add(*out);
    walk.add(*main);
    for (std::int64_t side = 0; side < side_count; ++side) walk.add(sides[side]);
    walk.finish(false);
    const Lines outs = walk.lines(*out);
    const Lines mains = walk.lines(*main);

    const int workers =
        pyeditfast::worker_count(walk.tiles(), threads, pyeditfast::kTilesPerThread);
    const std::int64_t deltas_per_worker = side_count * kTile;
    const std::unique_ptr<float[]> deltas(
        new (std::nothrow) float[static_cast<std::size_t>(deltas_per_worker * workers)]);
    if (deltas == nullptr) {
        return fail(pyeditfast::kSystemError, {message, message_size},
                    "no memory for %lld tiles of %lld floats",
                    static_cast<long long>(side_count * workers), static_cast<long long>(kTile));
    }

    const auto run = [&](int worker, std::int64_t begin, std::int64_t end) {
        alignas(64) float main_tile[kTile], side_tile[kTile], out_tile[kTile];
        alignas(64) float total[kTile], sum[kTile], share[kTile];
        float* kept = deltas.get() + worker * deltas_per_worker;
        for (std::int64_t number = begin; number < end; ++number) {
            const Tile tile = walk.tile(number);
            const float* centre = pyeditfast::load_tile(mains, tile, main_tile);
            clear(total, tile.count);
            for (std::int64_t s = 0; s < side_count; ++s) {
                const float* side = pyeditfast::load_tile(walk.lines(sides[s]), tile, side_tile);
                trim(kept + s * kTile, total, side, centre, tile.count, thresholds[s], weights[s]);
            }
            clear(sum, tile.count);
            clear(share, tile.count);
            for (std::int64_t s = 0; s < side_count; ++s) {
                add_agreeing(sum, share, kept + s * kTile, total, tile.count, weights[s]);
            }
            float* merged = outs.in_place(tile);
            if (merged == nullptr) merged = out_tile;
            add_average(merged, centre, sum, share, tile.count);
            pyeditfast::store_tile(outs, tile, merged);
        }
    };
    pyeditfast::parallel_ranges(walk.tiles(), threads, pyeditfast::kTilesPerThread, run);
    return pyeditfast::kOk;
}
