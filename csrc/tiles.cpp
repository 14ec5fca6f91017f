#include "tiles.h"

#include <algorithm>

#include "float16_arrays.h"
#include "float_types.h"
#include "vector_clones.h"

namespace pyeditfast {
namespace {

PYEDITFAST_VECTOR_CLONES
void load_bfloat16(float* __restrict out, const std::uint16_t* __restrict in,
                   std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(in[i]);
}

PYEDITFAST_VECTOR_CLONES
void store_bfloat16(std::uint16_t* __restrict out, const float* __restrict in,
                    std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = to_bfloat16(in[i]);
}

template <typename Value>
void gather(Value* out, const Value* in, std::int64_t stride, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = in[i * stride];
}

template <typename Value>
void scatter(Value* out, const Value* in, std::int64_t stride, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) out[i * stride] = in[i];
}

template <typename Value>
Value* first_of(const Lines& lines, const Tile& tile) {
    return static_cast<Value*>(lines.data) + tile.line * lines.line_stride +
           tile.begin * lines.element_stride;
}

}  // namespace

float* Lines::in_place(const Tile& tile) const {
    return type == kFloat32 && element_stride == 1 ? first_of<float>(*this, tile) : nullptr;
}

void prefetch_tile(const Lines& lines, const Tile& tile) {
#if defined(__GNUC__)
    constexpr std::int64_t kLine = 64;
    if (lines.data == nullptr || lines.element_stride != 1) return;
    const std::int64_t size = element_size(lines.type);
    // Not by pointers, which must not leave the matrix.
    const std::uintptr_t first =
        reinterpret_cast<std::uintptr_t>(lines.data) +
        static_cast<std::uintptr_t>((tile.line * lines.line_stride + tile.begin) * size);
    const std::uintptr_t behind = first + static_cast<std::uintptr_t>(tile.count * size);
    for (std::uintptr_t at = first; at < behind; at += kLine) {
        __builtin_prefetch(reinterpret_cast<const void*>(at));
    }
#else
    (void)lines, (void)tile;
#endif
}

const float* load_tile(const Lines& lines, const Tile& tile, float* buffer) {
    if (lines.type == kFloat32) {
        const float* in = first_of<const float>(lines, tile);
        if (lines.element_stride == 1) return in;
        gather(buffer, in, lines.element_stride, tile.count);
        return buffer;
    }
    const std::uint16_t* in = first_of<const std::uint16_t>(lines, tile);
    std::uint16_t together[kTile];
    if (lines.element_stride != 1) {
        gather(together, in, lines.element_stride, tile.count);
        in = together;
    }
    (lines.type == kBFloat16 ? load_bfloat16 : widen_float16)(buffer, in, tile.count);
    return buffer;
}

float* load_to_change(const Lines& lines, const Tile& tile, float* buffer) {
    float* values = lines.in_place(tile);
    if (values != nullptr) return values;
    load_tile(lines, tile, buffer);
    return buffer;
}

void store_tile(const Lines& lines, const Tile& tile, const float* values) {
    if (lines.type == kFloat32) {
        float* out = first_of<float>(lines, tile);
        if (out != values) scatter(out, values, lines.element_stride, tile.count);
        return;
    }
    std::uint16_t* out = first_of<std::uint16_t>(lines, tile);
    const auto store = lines.type == kBFloat16 ? store_bfloat16 : narrow_to_float16;
    if (lines.element_stride == 1) {
        store(out, values, tile.count);
        return;
    }
    std::uint16_t together[kTile];
    store(together, values, tile.count);
    scatter(out, together, lines.element_stride, tile.count);
}

std::uint16_t* load_halves(const Lines& lines, const Tile& tile, std::uint16_t* buffer) {
    std::uint16_t* in = first_of<std::uint16_t>(lines, tile);
    if (lines.element_stride == 1) return in;
    gather(buffer, in, lines.element_stride, tile.count);
    return buffer;
}

void store_halves(const Lines& lines, const Tile& tile, const std::uint16_t* values) {
    std::uint16_t* out = first_of<std::uint16_t>(lines, tile);
    if (out != values) scatter(out, values, lines.element_stride, tile.count);
}

Walk::Walk(std::int64_t rows, std::int64_t columns) : rows_(rows), columns_(columns) {}

// A dimension of one element has no stride to speak of: it gets the one that makes a single line.
pyeditfast_matrix Walk::normal(const pyeditfast_matrix& matrix) const {
    pyeditfast_matrix result = matrix;
    if (columns_ == 1) result.column_stride = matrix.row_stride;
    if (rows_ == 1) result.row_stride = result.column_stride * columns_;
    return result;
}

void Walk::add(const pyeditfast_matrix& added) {
    const pyeditfast_matrix matrix = normal(added);
    all_unbroken_ &= matrix.row_stride == matrix.column_stride * columns_;
    all_unbroken_by_columns_ &= matrix.column_stride == matrix.row_stride * rows_;
    all_along_rows_ &= matrix.column_stride == 1;
    all_along_columns_ &= matrix.row_stride == 1;
}

void Walk::finish(bool ordered) {
    by_columns_ = !all_unbroken_ && !all_along_rows_ && all_along_columns_;
    // Lines that some matrix crosses are short of cache lines: their neighbours come next.
    lines_first_ = !all_unbroken_ && !all_along_rows_ && !all_along_columns_;
    line_count_ = by_columns_ ? columns_ : rows_;
    length_ = by_columns_ ? rows_ : columns_;
    index_line_step_ = by_columns_ ? 1 : columns_;
    index_step_ = by_columns_ ? columns_ : 1;
    if (all_unbroken_ || (by_columns_ && all_unbroken_by_columns_ && !ordered)) {
        length_ *= line_count_;
        line_count_ = 1;
    }
    if (length_ == 0) line_count_ = 0;
    tiles_per_line_ = (length_ + kTile - 1) / kTile;
}

Lines Walk::lines(const pyeditfast_matrix& added) const {
    const pyeditfast_matrix matrix = normal(added);
    if (by_columns_) return {matrix.data, matrix.column_stride, matrix.row_stride, matrix.type};
    return {matrix.data, matrix.row_stride, matrix.column_stride, matrix.type};
}

Tile Walk::tile(std::int64_t number) const {
    const std::int64_t line = lines_first_ ? number % line_count_ : number / tiles_per_line_;
    const std::int64_t place = lines_first_ ? number / line_count_ : number % tiles_per_line_;
    const std::int64_t begin = place * kTile;
    return {line, begin, std::min(kTile, length_ - begin)};
}

}  // namespace pyeditfast
