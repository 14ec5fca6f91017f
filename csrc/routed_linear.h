// A linear module with side memories, one token a query, on a CUDA device; see
// pyeditfast/ops/routed_linear.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "decode_product.h"
#include "matrix.h"
#include "stream.h"

extern "C" {

// output[b] = W_r x_b + bias for r = route[b * route_stride], the number of a side; any other means
// the main memory. `output` [batch, d_out] is contiguous, of the type of x; `workspace` has at
// least pyeditfast_cuda_routed_linear_workspace(...) bytes, at a multiple of 16. Memories that no
// row uses are not read. Returns a Status.
int pyeditfast_cuda_routed_linear_with_route(const pyeditfast_decode* decode,
                                             const std::int64_t* route, std::int64_t route_stride,
                                             void* output, void* workspace,
                                             pyeditfast_stream stream, char* message,
                                             std::size_t message_size);

// The same with the route decided on the device: the side with the largest gap among those above
// their threshold, the first of equals, -1 if none is. `gaps` [batch, memories] are those of
// activation_gap.h; they and `route` [batch] are written.
int pyeditfast_cuda_routed_linear(const pyeditfast_decode* decode, int activation,
                                  const bool* mask, std::int64_t mask_stride,
                                  const float* thresholds, std::int64_t thresholds_stride,
                                  float* gaps, std::int64_t* route, void* output, void* workspace,
                                  pyeditfast_stream stream, char* message,
                                  std::size_t message_size);

std::int64_t pyeditfast_cuda_routed_linear_workspace(const pyeditfast_decode* decode,
                                                     bool has_route);

}  // extern "C"
