#include "masked_sgd.h"

#include <limits>

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

struct Step {
    float ratio;
    float lr;
    float weight_decay;
    float norm_constraint;
};

inline float stepped(float weight, float grad, std::uint32_t word, const Step& step) {
    const float masked = pyeditfast::uniform_float(word) < step.ratio ? grad : 0.0f;
    return weight - step.lr * (masked + step.weight_decay * weight);
}

PYEDITFAST_VECTOR_CLONES
void take_step(float* __restrict weight, const float* __restrict grad,
               const std::uint32_t* __restrict words, std::int64_t count, Step step) {
    for (std::int64_t i = 0; i < count; ++i) {
        weight[i] = stepped(weight[i], grad[i], words[i], step);
    }
}

PYEDITFAST_VECTOR_CLONES
void take_clamped_step(float* __restrict weight, const float* __restrict grad,
                       const float* __restrict main, const std::uint32_t* __restrict words,
                       std::int64_t count, Step step) {
    for (std::int64_t i = 0; i < count; ++i) {
        const float value = stepped(weight[i], grad[i], words[i], step);
        const float lowest = main[i] - step.norm_constraint;
        const float highest = main[i] + step.norm_constraint;
        const float above = value > lowest ? value : lowest;
        const float between = above < highest ? above : highest;
        // NaN goes through, the value's as the bounds'.
        const float clamped = value != value ? value : between;
        weight[i] = lowest != lowest ? lowest : clamped;
    }
}

int check(const pyeditfast_matrix* weight, const pyeditfast_matrix* grad,
          const pyeditfast_matrix* main, std::int64_t rows, std::int64_t columns,
          std::int64_t offset, const Step& step, int threads, Message message) {
    int status = pyeditfast::check_sizes(rows, columns, threads, message);
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix("weight", weight, rows, columns, true, message);
    }
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix("grad", grad, rows, columns, false, message);
    }
    if (status == pyeditfast::kOk && main != nullptr) {
        status = pyeditfast::check_matrix("main", main, rows, columns, false, message);
    }
    if (status != pyeditfast::kOk) return status;
    if (offset < 0 || offset > std::numeric_limits<std::int64_t>::max() - rows * columns) {
        return fail(kInvalidArgument, message,
                    "offset must be >= 0 and offset + elements below 2^63, got offset %lld for "
                    "%lld x %lld",
                    static_cast<long long>(offset), static_cast<long long>(rows),
                    static_cast<long long>(columns));
    }
    if (!(step.ratio >= 0.0f && step.ratio <= 1.0f)) {
        return fail(kInvalidArgument, message, "ratio must be in [0, 1], got %g",
                    static_cast<double>(step.ratio));
    }
    if (main != nullptr && !(step.norm_constraint >= 0.0f)) {
        return fail(kInvalidArgument, message, "norm_constraint must be >= 0, got %g",
                    static_cast<double>(step.norm_constraint));
    }
    return pyeditfast::kOk;
}

}  // namespace

extern "C" int pyeditfast_masked_sgd(const pyeditfast_matrix* weight,
                                     const pyeditfast_matrix* grad, const pyeditfast_matrix* main,
                                     std::int64_t rows, std::int64_t columns, std::uint64_t seed,
                                     float ratio, std::int64_t offset, float lr,
                                     float weight_decay, float norm_constraint, int threads,
                                     char* message, std::size_t message_size) {
    const Step step = {ratio, lr, weight_decay, norm_constraint};
    const int status = check(weight, grad, main, rows, columns, offset, step, threads,
                             {message, message_size});
    if (status != pyeditfast::kOk || rows == 0 || columns == 0) return status;

    pyeditfast::Walk walk(rows, columns);
    walk.add(*weight);
    walk.add(*grad);
    if (main != nullptr) walk.add(*main);
    walk.finish(true);
    const Lines weights = walk.lines(*weight);
    const Lines grads = walk.lines(*grad);
    const Lines mains = main != nullptr ? walk.lines(*main) : Lines{};

    const auto run = [&](int, std::int64_t begin, std::int64_t end) {
        alignas(64) float weight_tile[kTile], grad_tile[kTile], main_tile[kTile];
        alignas(64) std::uint32_t words[kTile];
        for (std::int64_t number = begin; number < end; ++number) {
            const Tile tile = walk.tile(number);
            pyeditfast::tile_words(words, walk, tile, offset, seed, {weights, grads, mains});
            float* values = pyeditfast::load_to_change(weights, tile, weight_tile);
            const float* gradients = pyeditfast::load_tile(grads, tile, grad_tile);
            if (main == nullptr) {
                take_step(values, gradients, words, tile.count, step);
            } else {
                const float* centres = pyeditfast::load_tile(mains, tile, main_tile);
                take_clamped_step(values, gradients, centres, words, tile.count, step);
            }
            pyeditfast::store_tile(weights, tile, values);
        }
    };
    pyeditfast::parallel_ranges(walk.tiles(), threads, pyeditfast::kTilesPerThread, run);
    return pyeditfast::kOk;
}
