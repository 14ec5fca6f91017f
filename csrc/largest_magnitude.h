// The largest magnitude of a matrix: for the check that a shift fits its weight in
// pyeditfast/ops/apply_shift.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"

extern "C" {

// *out = the largest |x[r, c]|, NaN where there is one, 0 where there are no elements. Returns a
// Status; nothing is written unless it is kOk.
int pyeditfast_largest_magnitude(const pyeditfast_matrix* x, std::int64_t rows,
                                 std::int64_t columns, float* out, int threads, char* message,
                                 std::size_t message_size);

}  // extern "C"
