// The step of a side memory for the gradient of a linear module, see pyeditfast/ops/masked_sgd.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"

extern "C" {

// The step of masked_sgd.h with grad(r, c) = sum over t of output_grads(r, t) inputs(c, t), of
// which only what is in the mask is computed, and nothing is stored. `output_grads` is rows x tokens
// and `inputs` columns x tokens: float32, a row's numbers side by side, fastest where each row
// begins at a multiple of 64 bytes. Bits depend neither on the number of threads nor on the
// processor. Returns a Status; `weight` is unchanged unless it is kOk.
int pyeditfast_masked_sgd_product(const pyeditfast_matrix* weight,
                                  const pyeditfast_matrix* output_grads,
                                  const pyeditfast_matrix* inputs, const pyeditfast_matrix* main,
                                  std::int64_t rows, std::int64_t columns, std::int64_t tokens,
                                  std::uint64_t seed, float ratio, std::int64_t offset, float lr,
                                  float weight_decay, float norm_constraint, int threads,
                                  char* message, std::size_t message_size);

// Whether the processor has the vectors that this is written for: without, it is slow.
bool pyeditfast_masked_sgd_product_is_fast();

}  // extern "C"
