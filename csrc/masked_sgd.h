// The step of a side memory in one pass, see pyeditfast/ops/masked_sgd.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"

extern "C" {

// weight = clamp(weight - lr * (mask * grad + weight_decay * weight), main +- norm_constraint), in
// float32, rounded once. Element (r, c) is in the mask where uniform number
// `offset + r * columns + c` of `seed` is below `ratio`. `main` may be null: nothing is clamped
// then. All matrices are `rows` x `columns`; their types and layouts may differ. `grad` and `main`
// must not overlap `weight`. Returns a Status; `weight` is unchanged unless it is kOk.
int pyeditfast_masked_sgd(const pyeditfast_matrix* weight, const pyeditfast_matrix* grad,
                          const pyeditfast_matrix* main, std::int64_t rows, std::int64_t columns,
                          std::uint64_t seed, float ratio, std::int64_t offset, float lr,
                          float weight_decay, float norm_constraint, int threads, char* message,
                          std::size_t message_size);

}  // extern "C"
