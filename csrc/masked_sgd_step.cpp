#include "masked_sgd_step.h"

#include "philox.h"
#include "status.h"
#include "vector_clones.h"

namespace pyeditfast {
namespace {

inline float stepped(float weight, float grad, std::uint32_t word, const MaskedStep& step) {
    const float masked = uniform_float(word) < step.ratio ? grad : 0.0f;
    return weight - step.lr * (masked + step.weight_decay * weight);
}

PYEDITFAST_VECTOR_CLONES
void take_step(float* __restrict weight, const float* __restrict grad,
               const std::uint32_t* __restrict words, std::int64_t count, MaskedStep step) {
    for (std::int64_t i = 0; i < count; ++i) {
        weight[i] = stepped(weight[i], grad[i], words[i], step);
    }
}

PYEDITFAST_VECTOR_CLONES
void take_clamped_step(float* __restrict weight, const float* __restrict grad,
                       const float* __restrict main, const std::uint32_t* __restrict words,
                       std::int64_t count, MaskedStep step) {
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

}  // namespace

int check_masked_step(const pyeditfast_matrix* weight, const pyeditfast_matrix* main,
                      std::int64_t rows, std::int64_t columns, std::int64_t offset,
                      const MaskedStep& step, int threads, Message message) {
    int status = check_sizes(rows, columns, threads, message);
    if (status == kOk) {
        status = check_matrix("weight", weight, rows, columns, true, message);
    }
    if (status == kOk && main != nullptr) {
        status = check_matrix("main", main, rows, columns, false, message);
    }
    if (status == kOk) {
        status = check_offset(offset, rows, columns, message);
    }
    if (status != kOk) return status;
    if (!(step.ratio >= 0.0f && step.ratio <= 1.0f)) {
        return fail(kInvalidArgument, message, "ratio must be in [0, 1], got %g",
                    static_cast<double>(step.ratio));
    }
    if (main != nullptr && !(step.norm_constraint >= 0.0f)) {
        return fail(kInvalidArgument, message, "norm_constraint must be >= 0, got %g",
                    static_cast<double>(step.norm_constraint));
    }
    return kOk;
}

void take_masked_step(float* weight, const float* grad, const float* main,
                      const std::uint32_t* words, std::int64_t count, const MaskedStep& step) {
    if (main == nullptr) {
        take_step(weight, grad, words, count, step);
    } else {
        take_clamped_step(weight, grad, main, words, count, step);
    }
}

}  // namespace pyeditfast
