// The exact k-th largest magnitude by radix select, see pyeditfast/ops/magnitude_threshold.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"
#include "stream.h"

extern "C" {

// *out = the k-th largest |x - base| (|x| where `base` is null), the difference taken in float32,
// NaN counted as larger than everything; k from 1 to rows * columns. The matrices are read once
// where `x` has 16 bits and there is no base, else twice; nothing of their size is allocated.
// Returns a Status; *out is unspecified unless it is kOk.
int pyeditfast_magnitude_threshold(const pyeditfast_matrix* x, const pyeditfast_matrix* base,
                                   std::int64_t rows, std::int64_t columns, std::int64_t k,
                                   float* out, int threads, char* message,
                                   std::size_t message_size);

// The same on a CUDA device (magnitude_threshold.cu): the matrices, `out` and `workspace` are in its
// memory, the workspace of at least pyeditfast_cuda_magnitude_threshold_workspace(...) bytes, at a
// multiple of 8. The matrices are read once where `x` has 16 bits and there is no base, else three
// times.
int pyeditfast_cuda_magnitude_threshold(const pyeditfast_matrix* x, const pyeditfast_matrix* base,
                                        std::int64_t rows, std::int64_t columns, std::int64_t k,
                                        float* out, void* workspace, pyeditfast_stream stream,
                                        char* message, std::size_t message_size);

std::int64_t pyeditfast_cuda_magnitude_threshold_workspace(int type, bool has_base);

}  // extern "C"

namespace pyeditfast {

// Requires matrices, sizes and a k that both forms take.
int check_magnitude_threshold(const pyeditfast_matrix* x, const pyeditfast_matrix* base,
                              std::int64_t rows, std::int64_t columns, std::int64_t k,
                              const float* out, int threads, Message message);

}  // namespace pyeditfast
