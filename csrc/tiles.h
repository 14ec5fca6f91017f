// Matrices cut into short pieces that are converted to float32 in the first-level cache.
//
// An op that works element by element runs over the tiles of all its matrices at once: it loads a
// tile of each as float32, computes, and stores. Whatever the types and layouts, each matrix is
// read once, in an order that suits it.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace pyeditfast {

constexpr std::int64_t kTile = 1024;

// 64K elements take about as long as starting a thread.
constexpr std::int64_t kTilesPerThread = 64;

// Elements [begin, begin + count) of a line.
struct Tile {
    std::int64_t line;
    std::int64_t begin;
    std::int64_t count;
};

// A matrix as lines of elements; see Walk.
struct Lines {
    void* data;
    std::int64_t line_stride;
    std::int64_t element_stride;
    int type;

    // The tile's floats in place, where they lie side by side as float32, else null.
    float* in_place(const Tile& tile) const;
};

// Has a tile fetched into the cache while something else is computed, if its elements lie side by
// side and there are any: lines without an address are left alone. It may lie behind the matrix.
void prefetch_tile(const Lines& lines, const Tile& tile);

// Returns the tile as float32: in place where that is possible, else in `buffer` (kTile floats).
const float* load_tile(const Lines& lines, const Tile& tile, float* buffer);

// The same, for values that are changed and then stored.
float* load_to_change(const Lines& lines, const Tile& tile, float* buffer);

// Writes a tile of float32, rounded to the lines' type (to nearest even).
void store_tile(const Lines& lines, const Tile& tile, const float* values);

// Returns a tile of a 16-bit type as it is, for values that are changed and then stored: in place
// where its elements lie side by side, else in `buffer` (kTile numbers).
std::uint16_t* load_halves(const Lines& lines, const Tile& tile, std::uint16_t* buffer);

// Writes what load_halves returned.
void store_halves(const Lines& lines, const Tile& tile, const std::uint16_t* values);

// The way through matrices of one size: as one line where all of them allow it, else along rows, or
// along columns where all are transposed.
class Walk {
public:
    Walk(std::int64_t rows, std::int64_t columns);

    // Takes a matrix into account. All come before `finish`.
    void add(const pyeditfast_matrix& matrix);

    // Settles the way. `ordered`: element_index will be asked for.
    void finish(bool ordered);

    // A matrix that was added, along this way.
    Lines lines(const pyeditfast_matrix& matrix) const;

    std::int64_t tiles() const { return line_count_ * tiles_per_line_; }
    Tile tile(std::int64_t number) const;

    // The row-major index of a tile's first element, and the distance from one element to the next.
    std::int64_t first_index(const Tile& tile) const {
        return tile.line * index_line_step_ + tile.begin * index_step_;
    }
    std::int64_t index_step() const { return index_step_; }

private:
    pyeditfast_matrix normal(const pyeditfast_matrix& matrix) const;

    std::int64_t rows_;
    std::int64_t columns_;
    bool all_unbroken_ = true;
    bool all_unbroken_by_columns_ = true;
    bool all_along_rows_ = true;
    bool all_along_columns_ = true;

    bool by_columns_ = false;
    bool lines_first_ = false;
    std::int64_t line_count_ = 0;
    std::int64_t length_ = 0;
    std::int64_t tiles_per_line_ = 0;
    std::int64_t index_line_step_ = 0;
    std::int64_t index_step_ = 1;
};

}  // namespace pyeditfast
