#include "masked_sgd_product.h"

#include <algorithm>

#include "chosen_products.h"
#include "masked_sgd_step.h"
#include "parallel.h"
#include "philox.h"
#include "philox_words.h"
#include "status.h"
#include "tiles.h"
#include "vector_clones.h"

namespace {

using pyeditfast::kChoices;
using pyeditfast::Lines;
using pyeditfast::MaskedStep;
using pyeditfast::Message;
using pyeditfast::Tile;
using pyeditfast::Vectors;

// A block of the weight: parts of a few lines. The vectors of its elements stay in the second-level
// cache for the block behind it.
constexpr std::int64_t kLines = 32;
constexpr std::int64_t kElements = 256;

// Numbers of a sum that are taken at once: of kChoices vectors so many stay in the first-level
// cache, and a long sum in parts is more accurate.
constexpr std::int64_t kLength = 448;

// About as many products as are taken while a thread starts.
constexpr std::int64_t kProductsPerThread = 1 << 20;

// chosen[w] = bit i for each of kChoices words from w kChoices on whose number is below the ratio.
PYEDITFAST_VECTOR_CLONES
void choose(std::uint32_t* __restrict chosen, const std::uint32_t* __restrict words,
            std::int64_t count, float ratio) {
    for (std::int64_t first = 0; first < count; first += kChoices) {
        std::uint32_t bits = 0;
        for (std::int64_t i = 0; i < std::min<std::int64_t>(kChoices, count - first); ++i) {
            const bool below = pyeditfast::uniform_float(words[first + i]) < ratio;
            bits |= static_cast<std::uint32_t>(below) << i;
        }
        chosen[first / kChoices] = static_cast<std::uint32_t>(bits);
    }
}

// The weight and what its gradient is made of, line by line: element (l, e) has the gradient
// `left` l times `right` e.
struct Problem {
    Lines weight;
    Lines main;
    Vectors left;
    Vectors right;
    std::int64_t tokens;
    std::int64_t index_line_step;
    std::int64_t index_step;
    std::uint64_t seed;
    std::int64_t offset;
    MaskedStep step;

    std::int64_t blocks_of_lines() const { return (left.count + kLines - 1) / kLines; }
    std::int64_t blocks_of_elements() const { return (right.count + kElements - 1) / kElements; }
};

Vectors part_of(const Vectors& vectors, std::int64_t first, std::int64_t most) {
    return {vectors.data + first * vectors.stride, vectors.stride,
            std::min(most, vectors.count - first)};
}

void take_block(const Problem& problem, std::int64_t first_line, std::int64_t first_element) {
    alignas(64) std::uint32_t words[kLines][kElements];
    alignas(64) float grads[kLines][kElements];
    std::uint32_t chosen[kLines][kElements / kChoices];
    const Vectors left = part_of(problem.left, first_line, kLines);
    const Vectors right = part_of(problem.right, first_element, kElements);
    for (std::int64_t l = 0; l < left.count; ++l) {
        // What is written at the end comes from memory meanwhile.
        const Tile tile = {first_line + l, first_element, right.count};
        pyeditfast::prefetch_tile(problem.weight, tile);
        pyeditfast::prefetch_tile(problem.main, tile);
        const std::int64_t start = problem.offset +
                                   (first_line + l) * problem.index_line_step +
                                   first_element * problem.index_step;
        pyeditfast::philox_words(words[l], right.count, static_cast<std::uint64_t>(start),
                                 static_cast<std::uint64_t>(problem.index_step), problem.seed);
        choose(chosen[l], words[l], right.count, problem.step.ratio);
        std::fill(grads[l], grads[l] + right.count, 0.0f);
    }
    const std::int64_t parts = (problem.tokens + kLength - 1) / kLength;
    for (std::int64_t part = 0; part < parts; ++part) {
        const std::int64_t token = problem.tokens * part / parts;
        const std::int64_t length = problem.tokens * (part + 1) / parts - token;
        const Vectors lefts = {left.data + token, left.stride, left.count};
        for (std::int64_t e = 0; e < right.count; e += kChoices) {
            Vectors rights = part_of(right, e, kChoices);
            rights.data += token;
            pyeditfast::add_chosen_products(&grads[0][e], kElements, lefts, rights, length,
                                            &chosen[0][e / kChoices], kElements / kChoices);
        }
    }
    alignas(64) float weight_tile[pyeditfast::kTile], main_tile[pyeditfast::kTile];
    for (std::int64_t l = 0; l < left.count; ++l) {
        const Tile tile = {first_line + l, first_element, right.count};
        float* values = pyeditfast::load_to_change(problem.weight, tile, weight_tile);
        const float* centres = problem.main.data == nullptr
                                   ? nullptr
                                   : pyeditfast::load_tile(problem.main, tile, main_tile);
        pyeditfast::take_masked_step(values, grads[l], centres, words[l], tile.count,
                                     problem.step);
        pyeditfast::store_tile(problem.weight, tile, values);
    }
}

int check_vectors(const char* name, const pyeditfast_matrix* matrix, std::int64_t count,
                  std::int64_t tokens, int threads, Message message) {
    int status = pyeditfast::check_sizes(count, tokens, threads, message);
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix(name, matrix, count, tokens, false, message);
    }
    if (status != pyeditfast::kOk) return status;
    if (matrix->type != pyeditfast::kFloat32 || (tokens > 1 && matrix->column_stride != 1)) {
        return pyeditfast::fail(pyeditfast::kInvalidArgument, message,
                                "%s has element type %d and column stride %lld; 0 (float32) and 1 "
                                "are needed",
                                name, matrix->type, static_cast<long long>(matrix->column_stride));
    }
    return pyeditfast::kOk;
}

Lines lines_of(const pyeditfast_matrix& matrix, bool by_columns) {
    return by_columns ? Lines{matrix.data, matrix.column_stride, matrix.row_stride, matrix.type}
                      : Lines{matrix.data, matrix.row_stride, matrix.column_stride, matrix.type};
}

Vectors vectors_of(const pyeditfast_matrix& matrix, std::int64_t count) {
    return {static_cast<const float*>(matrix.data), matrix.row_stride, count};
}

}  // namespace

extern "C" int pyeditfast_masked_sgd_product(
    const pyeditfast_matrix* weight, const pyeditfast_matrix* output_grads,
    const pyeditfast_matrix* inputs, const pyeditfast_matrix* main, std::int64_t rows,
    std::int64_t columns, std::int64_t tokens, std::uint64_t seed, float ratio,
    std::int64_t offset, float lr, float weight_decay, float norm_constraint, int threads,
    char* message, std::size_t message_size) {
    const MaskedStep step = {ratio, lr, weight_decay, norm_constraint};
    const Message failure = {message, message_size};
    int status = pyeditfast::check_masked_step(weight, main, rows, columns, offset, step, threads,
                                               failure);
    if (status == pyeditfast::kOk) {
        status = check_vectors("output_grads", output_grads, rows, tokens, threads, failure);
    }
    if (status == pyeditfast::kOk) {
        status = check_vectors("inputs", inputs, columns, tokens, threads, failure);
    }
    if (status != pyeditfast::kOk || rows == 0 || columns == 0) return status;

    const bool by_columns = weight->column_stride != 1 && weight->row_stride == 1;
    const Vectors of_rows = vectors_of(*output_grads, rows);
    const Vectors of_columns = vectors_of(*inputs, columns);
    const Problem problem = {lines_of(*weight, by_columns),
                             main == nullptr ? Lines{} : lines_of(*main, by_columns),
                             by_columns ? of_columns : of_rows,
                             by_columns ? of_rows : of_columns,
                             tokens,
                             by_columns ? 1 : columns,
                             by_columns ? columns : 1,
                             seed,
                             offset,
                             step};
    // Neighbouring blocks share their elements, whose vectors are the longer list to read.
    const std::int64_t high = problem.blocks_of_lines();
    const std::int64_t blocks = high * problem.blocks_of_elements();
    const std::int64_t products = kLines * kElements * std::max<std::int64_t>(1, tokens);
    const std::int64_t grain = std::max<std::int64_t>(1, kProductsPerThread / products);
    pyeditfast::parallel_ranges(blocks, threads, grain, [&](int, std::int64_t begin,
                                                           std::int64_t end) {
        for (std::int64_t block = begin; block < end; ++block) {
            take_block(problem, block % high * kLines, block / high * kElements);
        }
    });
    return pyeditfast::kOk;
}

extern "C" bool pyeditfast_masked_sgd_product_is_fast() {
    return pyeditfast::chosen_products_are_fast();
}
