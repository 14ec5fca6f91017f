// Cholesky factorization and solution on a CUDA device, see pyeditfast/ops/cholesky_solve.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "stream.h"

extern "C" {

// Solves G X = B for `items` symmetric positive definite G, of which only the lower triangles are
// read. `gram` [items, n, n] and `rhs` [items, n, columns], contiguous and row-major, have elements
// of `element_bits` bits: 32 for float32, 64 for float64. `rhs` becomes X; the lower triangle of
// `gram` is used up.
//
// `info` [items]: 0, or the number, from 1 on, of the item's first pivot that is no positive number
// with a finite reciprocal; the X of such an item is all NaN. `workspace` has at least
// pyeditfast_cuda_cholesky_solve_workspace(...) bytes, at a multiple of 16. All of it is memory of
// the stream's device, on which the work is only queued: nothing waits for it, and no memory is
// allocated. Where there is no element to solve for, nothing is written.
//
// Same bits for an item whatever the others are, and for a column whatever the others are.
int pyeditfast_cuda_cholesky_solve(void* gram, void* rhs, int element_bits, std::int64_t items,
                                   std::int64_t n, std::int64_t columns, std::int32_t* info,
                                   void* workspace, pyeditfast_stream stream, char* message,
                                   std::size_t message_size);

std::int64_t pyeditfast_cuda_cholesky_solve_workspace(int element_bits, std::int64_t items,
                                                      std::int64_t n);

}  // extern "C"
