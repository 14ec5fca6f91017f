#include "linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "activations.h"
#include "head_products.h"
#include "parallel.h"
#include "status.h"
#include "tiles.h"
#include "vector_clones.h"

// The gradient of a row is sum_v p_v weight_v - weight_target: attention with the head as keys and
// values. So one pass is enough, as in flash attention: sums belong to the largest logit so far and
// are scaled when a larger one comes. The target is left out of them, since what it contributes
// nearly cancels once the row is learned.
namespace {

using pyeditfast::fail;
using pyeditfast::HeadTile;
using pyeditfast::kHeadLanes;
using pyeditfast::kInvalidArgument;
using pyeditfast::kTile;
using pyeditfast::Lines;
using pyeditfast::Message;
using pyeditfast::Tile;

constexpr std::int64_t kRowsAtOnce = 64;

// A tile of the head fits the second-level cache twice, itself and the one that is fetched, beside
// the sums.
constexpr std::int64_t kTileNumbers = 32768;
constexpr std::int64_t kFewestTokens = 16;
constexpr std::int64_t kMostTokens = 256;

// The vocabulary is cut into parts by its size alone, whatever the number of threads.
constexpr std::int64_t kMostParts = 32;
constexpr std::int64_t kFewestTokensInPart = 512;

// About as many numbers as are read while a thread starts.
constexpr std::int64_t kNumbersPerThread = 65536;

// Where the largest logit starts: not at minus infinity, which the head may give.
constexpr float kLowest = std::numeric_limits<float>::lowest();

struct Problem {
    HeadTile head;
    const float* bias;
    const std::int64_t* targets;
    std::int64_t rows;
    std::int64_t lanes;
};

// What a part of the vocabulary gives for each row: its largest logit, and with e_v = e^(logit_v -
// largest) the sums of e_v and of e_v weight_v over all v but the target.
struct Part {
    float* largest;
    float* total;
    float* sums;
};

// largest[r] = the larger of itself and every logit; scale[r] = e^(what it was - what it is).
PYEDITFAST_VECTOR_CLONES
void raise_largest(float* __restrict largest, float* __restrict scale,
                   const float* __restrict logits, std::int64_t tokens, std::int64_t lanes) {
    for (std::int64_t r = 0; r < lanes; ++r) scale[r] = largest[r];
    for (std::int64_t v = 0; v < tokens; ++v) {
        for (std::int64_t r = 0; r < lanes; ++r) {
            const float logit = logits[v * lanes + r];
            largest[r] = largest[r] < logit ? logit : largest[r];
        }
    }
    for (std::int64_t r = 0; r < lanes; ++r) {
        const float factor = pyeditfast::exp_float(scale[r] - largest[r]);
        scale[r] = scale[r] == largest[r] ? 1.0f : factor;
    }
}

// logits[v][r] = e^(itself - largest[r]); NaN stays NaN.
PYEDITFAST_VECTOR_CLONES
void exponentiate(float* __restrict logits, const float* __restrict largest, std::int64_t tokens,
                  std::int64_t lanes) {
    for (std::int64_t v = 0; v < tokens; ++v) {
        for (std::int64_t r = 0; r < lanes; ++r) {
            const float x = logits[v * lanes + r] - largest[r];
            const float power = pyeditfast::exp_float(x);
            logits[v * lanes + r] = x != x ? x : power;
        }
    }
}

PYEDITFAST_VECTOR_CLONES
void add_totals(float* __restrict totals, const float* __restrict scale,
                const float* __restrict powers, std::int64_t tokens, std::int64_t lanes) {
    for (std::int64_t r = 0; r < lanes; ++r) totals[r] *= scale[r];
    for (std::int64_t v = 0; v < tokens; ++v) {
        for (std::int64_t r = 0; r < lanes; ++r) totals[r] += powers[v * lanes + r];
    }
}

PYEDITFAST_VECTOR_CLONES
void multiply(float* __restrict sums, float factor, std::int64_t count) {
    for (std::int64_t k = 0; k < count; ++k) sums[k] *= factor;
}

PYEDITFAST_VECTOR_CLONES
void add_scaled(float* __restrict sums, const float* __restrict more, float factor,
                std::int64_t count) {
    for (std::int64_t k = 0; k < count; ++k) sums[k] += more[k] * factor;
}

PYEDITFAST_VECTOR_CLONES
void finish(float* __restrict grads, const float* __restrict target, float others, float scale,
            std::int64_t count) {
    for (std::int64_t k = 0; k < count; ++k) grads[k] = (grads[k] - target[k] * others) * scale;
}

// Adds the tokens from `first` on, as many as a tile has, to a part.
void add_tile(const Problem& problem, std::int64_t first, std::int64_t tokens, const float* x,
              const Part& part, float* logits, float* scale, float* target_logits) {
    const std::int64_t lanes = problem.lanes;
    const HeadTile tile = {problem.head.rows + first * problem.head.stride, problem.head.stride,
                           tokens, problem.head.width};
    for (std::int64_t v = 0; v < tokens; ++v) {
        const float start = problem.bias == nullptr ? 0.0f : problem.bias[first + v];
        std::fill(logits + v * lanes, logits + (v + 1) * lanes, start);
    }
    pyeditfast::add_logits(logits, tile, x, lanes);
    raise_largest(part.largest, scale, logits, tokens, lanes);
    for (std::int64_t r = 0; r < problem.rows; ++r) {
        const std::int64_t v = problem.targets[r] - first;
        if (v >= 0 && v < tokens) target_logits[r] = logits[v * lanes + r];
        if (scale[r] != 1.0f) multiply(part.sums + r * tile.width, scale[r], tile.width);
    }
    exponentiate(logits, part.largest, tokens, lanes);
    for (std::int64_t r = 0; r < problem.rows; ++r) {
        const std::int64_t v = problem.targets[r] - first;
        if (v >= 0 && v < tokens) logits[v * lanes + r] = 0.0f;
    }
    add_totals(part.total, scale, logits, tokens, lanes);
    pyeditfast::add_weighted_tokens(part.sums, tile, logits, problem.rows, lanes);
}

// Adds the parts up, in their order, and writes a row's loss and gradient.
void merge_row(const Problem& problem, const std::vector<Part>& parts, std::int64_t row,
               float target_logit, float* loss, float* grad) {
    const std::int64_t width = problem.head.width;
    float largest = parts[0].largest[row];
    for (const Part& part : parts) largest = std::max(largest, part.largest[row]);
    float others = 0.0f;
    std::fill(grad, grad + width, 0.0f);
    for (const Part& part : parts) {
        const float factor = pyeditfast::exp_float(part.largest[row] - largest);
        others += part.total[row] * factor;
        add_scaled(grad, part.sums + row * width, factor, width);
    }
    const double from_largest =
        static_cast<double>(target_logit) - static_cast<double>(largest);
    const double target = std::exp(from_largest);
    // The logarithm of 1 and a little loses nothing this way.
    const double ratio = static_cast<double>(others) / target;
    *loss = static_cast<float>(from_largest > -60.0
                                   ? std::log1p(ratio)
                                   : std::log(static_cast<double>(others)) - from_largest);
    const auto sum = static_cast<float>(static_cast<double>(others) + target);
    finish(grad, problem.head.rows + problem.targets[row] * problem.head.stride, others,
           1.0f / sum, width);
}

std::int64_t divided_up(std::int64_t count, std::int64_t by) { return (count + by - 1) / by; }

// The losses and gradients of up to kRowsAtOnce rows.
class Block {
public:
    Block(const HeadTile& head, const float* bias, std::int64_t rows)
        : problem_{head, bias, nullptr, rows, divided_up(rows, kHeadLanes) * kHeadLanes},
          tokens_in_tile_(std::clamp(kTileNumbers / std::max<std::int64_t>(1, head.width) /
                                         kFewestTokens * kFewestTokens,
                                     kFewestTokens, kMostTokens)),
          tokens_in_part_(std::max(kFewestTokensInPart,
                                   divided_up(divided_up(head.tokens, kMostParts), kFewestTokens) *
                                       kFewestTokens)),
          parts_(static_cast<std::size_t>(divided_up(head.tokens, tokens_in_part_))),
          x_(count_of(head.width, problem_.lanes)),
          target_logits_(count_of(1, problem_.lanes)),
          statistics_(count_of(part_count(), 2 * problem_.lanes)),
          sums_(new float[count_of(part_count(), rows * head.width)]) {
        for (std::int64_t number = 0; number < part_count(); ++number) {
            float* largest = statistics_.data() + number * 2 * problem_.lanes;
            float* sums = sums_.get() + number * rows * head.width;
            parts_[static_cast<std::size_t>(number)] = {largest, largest + problem_.lanes, sums};
        }
    }

    // Takes the rows of `hidden` from `first` on.
    void run(const Lines& hidden, std::int64_t first, const std::int64_t* targets, float* losses,
             float* grads, int threads) {
        problem_.targets = targets;
        load(hidden, first);
        const std::int64_t numbers_in_part = tokens_in_part_ * problem_.head.width;
        const std::int64_t grain = divided_up(kNumbersPerThread, std::max<std::int64_t>(
                                                                     1, numbers_in_part));
        const std::int64_t buffer = (tokens_in_tile_ + 1) * problem_.lanes;
        buffers_.resize(count_of(pyeditfast::worker_count(part_count(), threads, grain), buffer));
        pyeditfast::parallel_ranges(
            part_count(), threads, grain,
            [&](int worker, std::int64_t begin, std::int64_t end) {
                for (std::int64_t number = begin; number < end; ++number) {
                    run_part(number, buffers_.data() + worker * buffer);
                }
            });
        const std::int64_t width = problem_.head.width;
        const std::int64_t numbers_in_row = std::max<std::int64_t>(1, width * part_count());
        pyeditfast::parallel_ranges(
            problem_.rows, threads, divided_up(kNumbersPerThread, numbers_in_row),
            [&](int, std::int64_t begin, std::int64_t end) {
                for (std::int64_t row = begin; row < end; ++row) {
                    merge_row(problem_, parts_, row, target_logits_[static_cast<std::size_t>(row)],
                              losses + row, grads + row * width);
                }
            });
    }

private:
    static std::size_t count_of(std::int64_t a, std::int64_t b) {
        return static_cast<std::size_t>(a) * static_cast<std::size_t>(b);
    }

    std::int64_t part_count() const { return static_cast<std::int64_t>(parts_.size()); }

    // The rows as lanes: x_[k * lanes + row].
    void load(const Lines& hidden, std::int64_t first) {
        alignas(64) float buffer[kTile];
        for (std::int64_t row = 0; row < problem_.rows; ++row) {
            for (std::int64_t begin = 0; begin < problem_.head.width; begin += kTile) {
                const Tile tile = {first + row, begin,
                                   std::min(kTile, problem_.head.width - begin)};
                const float* from = pyeditfast::load_tile(hidden, tile, buffer);
                float* to = x_.data() + begin * problem_.lanes + row;
                for (std::int64_t k = 0; k < tile.count; ++k) to[k * problem_.lanes] = from[k];
            }
        }
    }

    void run_part(std::int64_t number, float* buffer) {
        const Part& part = parts_[static_cast<std::size_t>(number)];
        std::fill(part.largest, part.largest + problem_.lanes, kLowest);
        std::fill(part.total, part.total + problem_.lanes, 0.0f);
        std::fill(part.sums, part.sums + problem_.rows * problem_.head.width, 0.0f);
        const std::int64_t begin = number * tokens_in_part_;
        const std::int64_t end = std::min(begin + tokens_in_part_, problem_.head.tokens);
        for (std::int64_t token = begin; token < end; token += tokens_in_tile_) {
            add_tile(problem_, token, std::min(tokens_in_tile_, end - token), x_.data(), part,
                     buffer + problem_.lanes, buffer, target_logits_.data());
        }
    }

    Problem problem_;
    std::int64_t tokens_in_tile_;
    std::int64_t tokens_in_part_;
    std::vector<Part> parts_;
    std::vector<float> x_;
    std::vector<float> target_logits_;
    std::vector<float> statistics_;
    // Each part clears its own.
    std::unique_ptr<float[]> sums_;
    std::vector<float> buffers_;
};

int check(const pyeditfast_matrix* hidden, const pyeditfast_matrix* weight,
          const std::int64_t* targets, const float* losses, const float* grads, std::int64_t rows,
          std::int64_t width, std::int64_t vocabulary, int threads, Message message) {
    int status = pyeditfast::check_sizes(rows, width, threads, message);
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_sizes(vocabulary, width, threads, message);
    }
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix("hidden", hidden, rows, width, false, message);
    }
    if (status == pyeditfast::kOk) {
        status = pyeditfast::check_matrix("weight", weight, vocabulary, width, false, message);
    }
    if (status != pyeditfast::kOk) return status;
    if (weight->type != pyeditfast::kFloat32 || (width > 1 && weight->column_stride != 1)) {
        return fail(kInvalidArgument, message,
                    "weight has element type %d and column stride %lld; 0 (float32) and 1 are "
                    "needed",
                    weight->type, static_cast<long long>(weight->column_stride));
    }
    if (rows > 0 && (targets == nullptr || losses == nullptr || (grads == nullptr && width > 0))) {
        return fail(kInvalidArgument, message, "%s is a null pointer, but there are %lld rows",
                    targets == nullptr  ? "targets"
                    : losses == nullptr ? "losses"
                                        : "grads",
                    static_cast<long long>(rows));
    }
    for (std::int64_t row = 0; row < rows; ++row) {
        if (targets[row] < 0 || targets[row] >= vocabulary) {
            return fail(kInvalidArgument, message,
                        "targets[%lld] is %lld; the vocabulary has %lld tokens",
                        static_cast<long long>(row), static_cast<long long>(targets[row]),
                        static_cast<long long>(vocabulary));
        }
    }
    return pyeditfast::kOk;
}

}  // namespace

extern "C" int pyeditfast_linear_cross_entropy(
    const pyeditfast_matrix* hidden, const pyeditfast_matrix* weight, const float* bias,
    const std::int64_t* targets, std::int64_t rows, std::int64_t width, std::int64_t vocabulary,
    float* losses, float* grads, int threads, char* message, std::size_t message_size) {
    const Message failure = {message, message_size};
    const int status = check(hidden, weight, targets, losses, grads, rows, width, vocabulary,
                             threads, failure);
    if (status != pyeditfast::kOk || rows == 0) return status;
    const HeadTile head = {static_cast<const float*>(weight->data), weight->row_stride, vocabulary,
                           width};
    const Lines lines = {hidden->data, hidden->row_stride, hidden->column_stride, hidden->type};
    try {
        for (std::int64_t first = 0; first < rows; first += kRowsAtOnce) {
            Block block(head, bias, std::min(kRowsAtOnce, rows - first));
            block.run(lines, first, targets + first, losses + first, grads + first * width,
                      threads);
        }
    } catch (const std::bad_alloc&) {
        return fail(pyeditfast::kSystemError, failure,
                    "no memory for the sums of %lld rows of %lld numbers",
                    static_cast<long long>(std::min(kRowsAtOnce, rows)),
                    static_cast<long long>(width));
    }
    return pyeditfast::kOk;
}

extern "C" bool pyeditfast_linear_cross_entropy_is_fast() {
    return pyeditfast::head_products_are_fast();
}
