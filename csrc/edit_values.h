// UltraEdit's values in one pass over each row, see pyeditfast/ops/edit_values.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"

extern "C" {

// With x^ = (x - mean) * scale, feature by feature: values[r] = -lr * ||keys[r]^||^2 * grads[r]^.
// `keys` is `rows` x `d_in`, `grads` and `values` are `rows` x `d_out`; `mean` and `scale` hold
// d_in + d_out floats, those of the keys first. Computed in float32, summed in a fixed order.
// `values` must not overlap the others. Returns a Status; `values` is unspecified unless it is kOk.
int pyeditfast_edit_values(const pyeditfast_matrix* values, const pyeditfast_matrix* keys,
                           const pyeditfast_matrix* grads, const float* mean, const float* scale,
                           std::int64_t rows, std::int64_t d_in, std::int64_t d_out, float lr,
                           int threads, char* message, std::size_t message_size);

}  // extern "C"
