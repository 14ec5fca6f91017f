// Adding a dense shift to a weight with one rounding, see pyeditfast/ops/apply_shift.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"

extern "C" {

// weight = round(weight + shift), the sum in float32; all matrices are `rows` x `columns`.
// `rounding` 0: to nearest even. 1: for 16-bit weights, to one of the two neighbours, the upper
// where uniform number `offset + r * columns + c` of `seed` is below the fraction; unbiased. 2: to
// nearest, with `remainder`, of the weight's type, added to the shift, and what rounding loses left
// in it; null otherwise. The matrices must not overlap. Returns a Status; nothing is changed unless
// it is kOk.
int pyeditfast_apply_shift(const pyeditfast_matrix* weight, const pyeditfast_matrix* shift,
                           const pyeditfast_matrix* remainder, std::int64_t rows,
                           std::int64_t columns, int rounding, std::uint64_t seed,
                           std::int64_t offset, int threads, char* message,
                           std::size_t message_size);

}  // extern "C"
