// The end of the activation gap, see pyeditfast/ops/activation_gap.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"

extern "C" {

// gaps[t] = || act(side[t]) - act(main[t]) ||_2 for outputs `tokens` x `d_out` of a side memory
// and of the main memory; `activation` is an Activation of activations.h. Computed in float32,
// summed in a fixed order. Returns a Status; `gaps` is unspecified unless it is kOk.
int pyeditfast_activation_gap(const pyeditfast_matrix* main, const pyeditfast_matrix* side,
                              std::int64_t tokens, std::int64_t d_out, int activation, float* gaps,
                              int threads, char* message, std::size_t message_size);

}  // extern "C"
