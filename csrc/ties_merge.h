// TIES of side memories in one pass, their thresholds given, see pyeditfast/ops/ties_merge.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"

extern "C" {

// With D_s = sides[s] - main, 0 where |D_s| < thresholds[s] (or either is NaN), and the sign of
// sum(weights[s] * D_s), 0 counting as +: out = main + the average of the D_s of that sign by their
// weights; in float32, in the order of `sides`, rounded once. All matrices are `rows` x `columns`;
// their types and layouts may differ. `out` must not overlap the others. Returns a Status; `out` is
// unspecified unless it is kOk.
int pyeditfast_ties_merge(const pyeditfast_matrix* out, const pyeditfast_matrix* main,
                          const pyeditfast_matrix* sides, const float* thresholds,
                          const float* weights, std::int64_t side_count, std::int64_t rows,
                          std::int64_t columns, int threads, char* message,
                          std::size_t message_size);

}  // extern "C"
