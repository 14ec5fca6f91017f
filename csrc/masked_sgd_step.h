// What the steps of a side memory share, see masked_sgd.h.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace pyeditfast {

struct MaskedStep {
    float ratio;
    float lr;
    float weight_decay;
    float norm_constraint;
};

// Requires a weight and, unless it is null, a main memory of `rows` x `columns`, and numbers of the
// step and of the mask that are in range.
int check_masked_step(const pyeditfast_matrix* weight, const pyeditfast_matrix* main,
                      std::int64_t rows, std::int64_t columns, std::int64_t offset,
                      const MaskedStep& step, int threads, Message message);

// Takes the step on weights side by side, clamped around `main` unless it is null. Gradients count
// where the uniform number of their word is below the ratio.
void take_masked_step(float* weight, const float* grad, const float* main,
                      const std::uint32_t* words, std::int64_t count, const MaskedStep& step);

}  // namespace pyeditfast
