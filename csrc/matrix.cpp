#include "matrix.h"

#include <algorithm>
#include <limits>

namespace pyeditfast {
namespace {

constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();

bool product_fits(std::int64_t a, std::int64_t b, std::int64_t limit) {
    return a == 0 || b <= limit / a;
}

// Says whether the bytes between the first and the last element can be counted.
bool extent_fits(const pyeditfast_matrix& matrix, std::int64_t rows, std::int64_t columns) {
    const std::int64_t limit = kLargest / element_size(matrix.type) / 2;
    return product_fits(rows - 1, matrix.row_stride, limit) &&
           product_fits(columns - 1, matrix.column_stride, limit);
}

// Says no only where every line lies behind the one before it.
bool may_share_memory(const pyeditfast_matrix& matrix, std::int64_t rows, std::int64_t columns) {
    if (rows <= 1 && columns <= 1) return false;
    if (rows <= 1) return matrix.column_stride == 0;
    if (columns <= 1) return matrix.row_stride == 0;
    const bool by_rows = matrix.row_stride >= matrix.column_stride;
    const std::int64_t inner = by_rows ? matrix.column_stride : matrix.row_stride;
    const std::int64_t outer = by_rows ? matrix.row_stride : matrix.column_stride;
    const std::int64_t inner_size = by_rows ? columns : rows;
    return inner == 0 || outer <= inner * (inner_size - 1);
}

}  // namespace

int check_sizes(std::int64_t rows, std::int64_t columns, int threads, Message message) {
    if (rows < 0 || columns < 0 || !product_fits(rows, columns, kLargest / 8)) {
        return fail(kInvalidArgument, message,
                    "rows and columns must be >= 0 and their product below 2^60, got %lld and %lld",
                    static_cast<long long>(rows), static_cast<long long>(columns));
    }
    if (threads < 1) {
        return fail(kInvalidArgument, message, "threads must be >= 1, got %d", threads);
    }
    return kOk;
}

int check_offset(std::int64_t offset, std::int64_t rows, std::int64_t columns, Message message) {
    if (offset >= 0 && offset <= kLargest - rows * columns) return kOk;
    return fail(kInvalidArgument, message,
                "offset must be >= 0 and offset + elements below 2^63, got offset %lld for %lld x %lld",
                static_cast<long long>(offset), static_cast<long long>(rows),
                static_cast<long long>(columns));
}

int check_matrix(const char* name, const pyeditfast_matrix* matrix, std::int64_t rows,
                 std::int64_t columns, bool written, Message message) {
    const auto strides = [=](const char* format) {
        return fail(kInvalidArgument, message, format, name,
                    static_cast<long long>(matrix->row_stride),
                    static_cast<long long>(matrix->column_stride), static_cast<long long>(rows),
                    static_cast<long long>(columns));
    };
    if (matrix == nullptr) return fail(kInvalidArgument, message, "%s is missing", name);
    if (matrix->type < kFloat32 || matrix->type > kFloat16) {
        return fail(kInvalidArgument, message,
                    "%s has element type %d; 0 (float32), 1 (bfloat16) or 2 (float16) is needed",
                    name, matrix->type);
    }
    if (matrix->row_stride < 0 || matrix->column_stride < 0) {
        return strides("%s has strides %lld and %lld; 0 or more is needed (%lld x %lld)");
    }
    if (rows == 0 || columns == 0) return kOk;
    if (matrix->data == nullptr) {
        return fail(kInvalidArgument, message, "%s is a null pointer, but has %lld x %lld elements",
                    name, static_cast<long long>(rows), static_cast<long long>(columns));
    }
    if (reinterpret_cast<std::uintptr_t>(matrix->data) %
            static_cast<std::uintptr_t>(element_size(matrix->type)) !=
        0) {
        return fail(kInvalidArgument, message, "%s is at %p, which is no multiple of %d", name,
                    matrix->data, static_cast<int>(element_size(matrix->type)));
    }
    if (!extent_fits(*matrix, rows, columns)) {
        return strides("%s has strides %lld and %lld, too large for %lld x %lld elements");
    }
    if (written && may_share_memory(*matrix, rows, columns)) {
        return strides(
            "%s has strides %lld and %lld: its %lld x %lld elements interleave or share memory");
    }
    return kOk;
}

}  // namespace pyeditfast
