// Batches of linear systems in memory, as the kernels of cholesky_solve.cu see them.
#pragma once

#include <cstdint>

#include "device.h"
#include "tile_products.h"

namespace pyeditfast {
namespace cholesky {

using namespace device;

// One system. Below the diagonal L takes the place of G, tile by tile. Its tiles on the diagonal
// are kept apart, because other blocks still read those of G while one writes them; their own
// diagonals hold reciprocals, by which substitution multiplies.
template <typename T>
struct System {
    T* gram;
    T* diagonals;
    T* rhs;
    int n;
    std::int64_t columns;
    bool gram_aligned, rhs_aligned;

    DEVICE int tiles() const { return ceiling_of_division(n, kSide); }
    DEVICE int rows(int i) const { return n - i * kSide < kSide ? n - i * kSide : kSide; }
    DEVICE Window<T> tile(int i, int j) const {
        return {gram + static_cast<std::int64_t>(i) * kSide * n + j * kSide, n, rows(i), rows(j),
                gram_aligned};
    }
    DEVICE Window<T> diagonal(int i) const {
        return {diagonals + static_cast<std::int64_t>(i) * kSide * kSide, kSide, kSide, kSide,
                true};
    }
    DEVICE Window<T> solution(int i, std::int64_t first_column, int width) const {
        const std::int64_t rest = columns - first_column;
        return {rhs + i * kSide * columns + first_column, columns, rows(i),
                rest < width ? static_cast<int>(rest) : width, rhs_aligned};
    }
};

template <typename T>
struct Systems {
    System<T> first;
    std::int32_t* info;

    DEVICE System<T> item(std::int64_t number) const {
        System<T> system = first;
        system.gram += number * first.n * first.n;
        system.diagonals += number * first.tiles() * kSide * kSide;
        system.rhs += number * first.n * first.columns;
        return system;
    }
};

}  // namespace cholesky
}  // namespace pyeditfast
