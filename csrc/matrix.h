// Matrices as the C functions of csrc take them: an address, an element type and two strides.
#pragma once

#include <cstdint>

#include "status.h"

extern "C" {

// Element (r, c) lies `r * row_stride + c * column_stride` elements behind `data`. A transposed
// matrix has row_stride 1. `type` is an ElementType.
struct pyeditfast_matrix {
    void* data;
    std::int64_t row_stride;
    std::int64_t column_stride;
    int type;
};

}  // extern "C"

namespace pyeditfast {

enum ElementType : int {
    kFloat32 = 0,
    kBFloat16 = 1,
    kFloat16 = 2,
};

inline std::int64_t element_size(int type) { return type == kFloat32 ? 4 : 2; }

// Requires rows and columns of 0 or more whose product fits, and at least one thread.
int check_sizes(std::int64_t rows, std::int64_t columns, int threads, Message message);

// Requires that elements numbered from `offset` on have numbers below 2^63. Call check_sizes first.
int check_offset(std::int64_t offset, std::int64_t rows, std::int64_t columns, Message message);

// Requires a known type, an aligned address wherever there are elements, and strides of 0 or more
// that stay inside the address space; of a matrix that is written also that its lines lie one
// behind the other. Call check_sizes first.
int check_matrix(const char* name, const pyeditfast_matrix* matrix, std::int64_t rows,
                 std::int64_t columns, bool written, Message message);

}  // namespace pyeditfast
