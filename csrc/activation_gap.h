// The end of the activation gap, see pyeditfast/ops/activation_gap.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "decode_product.h"
#include "matrix.h"
#include "stream.h"

extern "C" {

// gaps[t] = || act(side[t]) - act(main[t]) ||_2 for outputs `tokens` x `d_out` of a side memory
// and of the main memory; `activation` is an Activation of activations.h. Computed in float32,
// summed in a fixed order. Returns a Status; `gaps` is unspecified unless it is kOk.
int pyeditfast_activation_gap(const pyeditfast_matrix* main, const pyeditfast_matrix* side,
                              std::int64_t tokens, std::int64_t d_out, int activation, float* gaps,
                              int threads, char* message, std::size_t message_size);

// gaps[b * memories + m] = || act(W_m x_b + bias) - act(W x_b + bias) ||_2 for single tokens on a
// CUDA device (activation_gap.cu), 0 where the mask is false; `mask` may be null. All memories are
// read once. `workspace` has at least pyeditfast_cuda_activation_gap_workspace(...) bytes, at a
// multiple of 16.
int pyeditfast_cuda_activation_gap(const pyeditfast_decode* decode, int activation,
                                   const bool* mask, std::int64_t mask_stride, float* gaps,
                                   void* workspace, pyeditfast_stream stream, char* message,
                                   std::size_t message_size);

std::int64_t pyeditfast_cuda_activation_gap_workspace(const pyeditfast_decode* decode);

}  // extern "C"

namespace pyeditfast {

// Requires what gaps_of_parts takes beside check_decode.
int check_gap(const pyeditfast_decode& decode, int activation, const float* gaps,
              const void* workspace, Message message);

// Queues the gaps [batch, memories] of products that multiply_tokens leaves without a route.
int gaps_of_parts(const char* op, const pyeditfast_decode& decode, const DecodeParts& parts,
                  int activation, Strided<const bool> mask, float* gaps,
                  const pyeditfast_stream& stream, Message message);

}  // namespace pyeditfast
