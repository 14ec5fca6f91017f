#include "masked_sgd.h"

#include "masked_sgd_step.h"
#include "parallel.h"
#include "status.h"
#include "tile_words.h"
#include "tiles.h"

using pyeditfast::kTile;

extern "C" int pyeditfast_masked_sgd(const pyeditfast_matrix* weight,
                                     const pyeditfast_matrix* grad, const pyeditfast_matrix* main,
                                     std::int64_t rows, std::int64_t columns, std::uint64_t seed,
                                     float ratio, std::int64_t offset, float lr,
                                     float weight_decay, float norm_constraint, int threads,
                                     char* message, std::size_t message_size) {
    const pyeditfast::MaskedStep step = {ratio, lr, weight_decay, norm_constraint};
    const pyeditfast::Message failure = {message, message_size};
    int status = pyeditfast::check_masked_step(weight, main, rows, columns, offset, step, threads,
                                               failure);
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix("grad", grad, rows, columns, false, failure);
    }
    if (status != pyeditfast::kOk || rows == 0 || columns == 0) return status;

    pyeditfast::Walk walk(rows, columns);
    walk.add(*weight);
    walk.add(*grad);
    if (main != nullptr) walk.add(*main);
    walk.finish(true);
    const pyeditfast::Lines weights = walk.lines(*weight);
    const pyeditfast::Lines grads = walk.lines(*grad);
    const pyeditfast::Lines mains = main != nullptr ? walk.lines(*main) : pyeditfast::Lines{};

    const auto run = [&](int, std::int64_t begin, std::int64_t end) {
        alignas(64) float weight_tile[kTile], grad_tile[kTile], main_tile[kTile];
        alignas(64) std::uint32_t words[kTile];
        for (std::int64_t number = begin; number < end; ++number) {
            const pyeditfast::Tile tile = walk.tile(number);
            pyeditfast::tile_words(words, walk, tile, offset, seed, {weights, grads, mains});
            float* values = pyeditfast::load_to_change(weights, tile, weight_tile);
            const float* gradients = pyeditfast::load_tile(grads, tile, grad_tile);
            const float* centres =
                main == nullptr ? nullptr : pyeditfast::load_tile(mains, tile, main_tile);
            pyeditfast::take_masked_step(values, gradients, centres, words, tile.count, step);
            pyeditfast::store_tile(weights, tile, values);
        }
    };
    pyeditfast::parallel_ranges(walk.tiles(), threads, pyeditfast::kTilesPerThread, run);
    return pyeditfast::kOk;
}
