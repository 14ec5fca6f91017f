// The cross-entropy of an output head, see pyeditfast/ops/linear_cross_entropy.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"

extern "C" {

// losses[r] = log sum_v e^logit(r, v) - logit(r, targets[r]) with logit(r, v) = weight_v hidden_r +
// bias_v, and grads[r] = its gradient by hidden_r, for `hidden` rows x width, `weight` vocabulary x
// width and `bias` of vocabulary numbers or null; `grads` is rows x width without gaps. `weight` is
// float32 with rows side by side, and is read once for every 64 rows. Computed in float32 by fused
// multiply-adds; bits depend neither on the number of threads nor on the processor. Returns a
// Status; `losses` and `grads` are unspecified unless it is kOk.
int pyeditfast_linear_cross_entropy(const pyeditfast_matrix* hidden,
                                    const pyeditfast_matrix* weight, const float* bias,
                                    const std::int64_t* targets, std::int64_t rows,
                                    std::int64_t width, std::int64_t vocabulary, float* losses,
                                    float* grads, int threads, char* message,
                                    std::size_t message_size);

// Whether the processor has the vectors that this is written for: without, it is slow.
bool pyeditfast_linear_cross_entropy_is_fast();

}  // extern "C"
