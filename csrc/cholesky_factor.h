// The kernel that factors, see cholesky_solve.cu.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cholesky_system.h"
#include "device.h"
#include "tile_products.h"

namespace pyeditfast {
namespace cholesky {

using Square = Sharing<2, kQuads>;

template <typename T>
using SquareOperand = Operand<T, true, kQuads, Square::kThreads>;

// What a block that factors has in shared memory.
template <typename T>
struct FactorMemory {
    static constexpr int kSlabs = 2 * SquareOperand<T>::kSize;
    static constexpr int kFour = 4 * kQuads;
    static constexpr std::size_t kBytes = (2 * kSlabs + 4 + 3 * kFour + kQuads) * sizeof(Quad<T>);

    SharedMemory memory;
    Shared<Quad<T>> left = memory.take<Quad<T>>(kSlabs);
    Shared<Quad<T>> right = memory.take<Quad<T>>(kSlabs);
    // Of the four pivots in turn: the rows of their part, the columns of L D and of L below it, and
    // the rows of the tile that is carried along.
    Shared<Quad<T>> pivot_part = memory.take<Quad<T>>(4);
    Shared<Quad<T>> scaled = memory.take<Quad<T>>(kFour);
    Shared<Quad<T>> lower = memory.take<Quad<T>>(kFour);
    Shared<Quad<T>> carried = memory.take<Quad<T>>(kFour);
    Shared<Quad<T>> pivots = memory.take<Quad<T>>(kQuads);
};

// Calls multiply(left, right) for every slab of two tiles, whose columns are the steps of the sum.
template <typename T, typename Multiply>
DEVICE inline void multiply_tiles(const Window<T>& left_tile, const Window<T>& right_tile,
                                  const FactorMemory<T>& memory, const Multiply& multiply) {
    constexpr int kSize = SquareOperand<T>::kSize;
    SquareOperand<T> left, right;
    run_through(
        kSlabsOfTile,
        [&](int slab) {
            left.fetch(left_tile, slab * kSlab);
            right.fetch(right_tile, slab * kSlab);
        },
        [&](int slab) {
            left.store(memory.left + slab % 2 * kSize);
            right.store(memory.right + slab % 2 * kSize);
        },
        [&](int slab) {
            multiply(memory.left + slab % 2 * kSize, memory.right + slab % 2 * kSize);
        });
}

// A tile right of the last column: A(i, j) -= L(i, last) L(j, last)ᵀ.
template <typename T>
DEVICE inline void update_tile(const System<T>& system, int i, int j, int last,
                               const FactorMemory<T>& memory) {
    Part<T> sums[Square::kRowQuads] = {};
    multiply_tiles(system.tile(i, last), system.tile(j, last), memory,
                   [&](Shared<Quad<T>> left, Shared<Quad<T>> right) {
                       add_slab<Square>(sums, left, right);
                   });
    const Window<T> tile = system.tile(i, j);
    const int column = 4 * Square::column();
    UNROLL
    for (int p = 0; p < Square::kRowQuads; ++p) {
        const int row = 4 * Square::row(p);
        const Part<T> part = tile.part(row, column) - sums[p];
        if (i == j) {
            tile.store_lower(part, row, column);
        } else {
            tile.store(part, row, column);
        }
    }
}

// A 4 x 4 part on the diagonal as L D Lᵀ: of L and of L D what is below the diagonal.
template <typename T>
struct Pivots {
    Quad<T> d;
    T reciprocal[4], lower[4][4], scaled[4][4];

    DEVICE explicit Pivots(const Shared<Quad<T>>& part) {
        Quad<T> rows[4];
        UNROLL
        for (int r = 0; r < 4; ++r) rows[r] = part[r];
        UNROLL
        for (int c = 0; c < 4; ++c) {
            d.at[c] = rows[c].at[c];
            reciprocal[c] = T(1) / d.at[c];
            UNROLL
            for (int r = c + 1; r < 4; ++r) {
                scaled[r][c] = rows[r].at[c];
                lower[r][c] = scaled[r][c] * reciprocal[c];
                UNROLL
                for (int k = c + 1; k <= r; ++k) {
                    rows[r].at[k] = std::fma(-lower[r][c], scaled[k][c], rows[r].at[k]);
                }
            }
        }
    }
};

// The block column at work, as one thread has it: the tile on the diagonal, of which what is above
// the diagonal is of no use, and a tile below it, transposed. Of the block that stores the diagonal
// the other tile is of no use.
template <typename T>
struct Column {
    Part<T> diagonal[Square::kRowQuads];
    Part<T> below[Square::kRowQuads];

    // Both tiles take part in sums with the columns before them.
    DEVICE void add(const Shared<Quad<T>>& left, const Shared<Quad<T>>& right) {
        constexpr int kPitch = SquareOperand<T>::kPitch;
        for (int step = 0; step < kSlab; ++step) {
            const Quad<T> column = left[step * kPitch + Square::column()];
            const Quad<T> column_below = right[step * kPitch + Square::column()];
            UNROLL
            for (int p = 0; p < Square::kRowQuads; ++p) {
                const Quad<T> row = left[step * kPitch + Square::row(p)];
                add_product(diagonal[p], row, column);
                add_product(below[p], row, column_below);
            }
        }
    }

    DEVICE void subtract_from(const Window<T>& diagonal_tile, const Window<T>& tile_below) {
        const int column = Square::column();
        UNROLL
        for (int p = 0; p < Square::kRowQuads; ++p) {
            const int row = Square::row(p);
            diagonal[p] = diagonal_tile.part(4 * row, 4 * column) - diagonal[p];
            // Beyond the last row the identity, so that every four pivots are whole.
            UNROLL
            for (int r = 0; r < 4; ++r) {
                if (column == row && 4 * row + r >= diagonal_tile.rows) {
                    diagonal[p].rows[r].at[r] = T(1);
                }
            }
            below[p] = transposed(tile_below.part(4 * column, 4 * row)) - below[p];
        }
    }

    DEVICE void eliminate(int fours, const FactorMemory<T>& memory) {
        for (int four = 0; four < fours; ++four) {
            show_pivots(four, memory);
            barrier();
            finish_four(four, memory);
            barrier();
            update_rest(four, memory);
        }
    }

private:
    DEVICE void show_pivots(int four, const FactorMemory<T>& memory) const {
        UNROLL
        for (int p = 0; p < Square::kRowQuads; ++p) {
            if (Square::row(p) != four || Square::column() != four) continue;
            UNROLL
            for (int r = 0; r < 4; ++r) memory.pivot_part[r] = diagonal[p].rows[r];
        }
    }

    // The four columns below the pivots, and the four rows that are carried along.
    DEVICE void finish_four(int four, const FactorMemory<T>& memory) {
        const int column = Square::column();
        if (column != four && Square::row(four / Square::kDistance) != four) return;
        const Pivots<T> pivots(memory.pivot_part);
        UNROLL
        for (int p = 0; p < Square::kRowQuads; ++p) {
            const int row = Square::row(p);
            if (column == four && row >= four) {
                finish_columns(diagonal[p], pivots);
                UNROLL
                for (int c = 0; c < 4; ++c) {
                    Quad<T> scaled, lower;
                    UNROLL
                    for (int r = 0; r < 4; ++r) {
                        scaled.at[r] = diagonal[p].rows[r].at[c];
                        lower.at[r] = scaled.at[r] * pivots.reciprocal[c];
                    }
                    memory.scaled[c * kQuads + row] = scaled;
                    memory.lower[c * kQuads + row] = lower;
                }
            }
            if (row == four) {
                if (column == four) memory.pivots[four] = pivots.d;
                finish_rows(below[p], pivots);
                UNROLL
                for (int r = 0; r < 4; ++r) memory.carried[r * kQuads + column] = below[p].rows[r];
            }
        }
    }

    // part (L D) -> (L D) of its rows
    DEVICE static void finish_columns(Part<T>& part, const Pivots<T>& pivots) {
        UNROLL
        for (int r = 0; r < 4; ++r) {
            Quad<T>& row = part.rows[r];
            UNROLL
            for (int c = 0; c < 4; ++c) {
                const T lower = row.at[c] * pivots.reciprocal[c];
                UNROLL
                for (int k = c + 1; k < 4; ++k) {
                    row.at[k] = std::fma(-lower, pivots.scaled[k][c], row.at[k]);
                }
            }
        }
    }

    DEVICE static void finish_rows(Part<T>& part, const Pivots<T>& pivots) {
        UNROLL
        for (int c = 0; c < 4; ++c) {
            UNROLL
            for (int r = c + 1; r < 4; ++r) {
                UNROLL
                for (int k = 0; k < 4; ++k) {
                    part.rows[r].at[k] =
                        std::fma(-pivots.lower[r][c], part.rows[c].at[k], part.rows[r].at[k]);
                }
            }
        }
    }

    DEVICE void update_rest(int four, const FactorMemory<T>& memory) {
        const int column = Square::column();
        UNROLL
        for (int p = 0; p < Square::kRowQuads; ++p) {
            const int row = Square::row(p);
            if (row <= four) continue;
            Part<T> product = {};
            UNROLL
            for (int c = 0; c < 4; ++c) {
                const Quad<T> lower = memory.lower[c * kQuads + row];
                const Quad<T> carried = memory.carried[c * kQuads + column];
                add_product(product, lower, carried);
            }
            below[p] = below[p] - product;
            if (column <= four || column > row) continue;
            product = {};
            UNROLL
            for (int c = 0; c < 4; ++c) {
                const Quad<T> lower = memory.lower[c * kQuads + row];
                const Quad<T> scaled = memory.scaled[c * kQuads + column];
                add_product(product, lower, scaled);
            }
            diagonal[p] = diagonal[p] - product;
        }
    }
};

// What turns L D Lᵀ into L Lᵀ: 1 / sqrt(D) of four pivots, or 1 beyond the last.
template <typename T>
DEVICE inline Quad<T> inverse_roots(int four, int fours, const FactorMemory<T>& memory) {
    Quad<T> roots = {{T(1), T(1), T(1), T(1)}};
    if (four >= fours) return roots;
    const Quad<T> pivots = memory.pivots[four];
    UNROLL
    for (int i = 0; i < 4; ++i) roots.at[i] = T(1) / std::sqrt(pivots.at[i]);
    return roots;
}

template <typename T>
DEVICE inline void store_diagonal(const Column<T>& own, int fours, const Window<T>& tile,
                                  const FactorMemory<T>& memory) {
    const Quad<T> roots = inverse_roots(Square::column(), fours, memory);
    UNROLL
    for (int p = 0; p < Square::kRowQuads; ++p) {
        const int row = 4 * Square::row(p), column = 4 * Square::column();
        Part<T> part;
        UNROLL
        for (int r = 0; r < 4; ++r) {
            UNROLL
            for (int c = 0; c < 4; ++c) {
                const int above = column + c - row - r;
                const T element = own.diagonal[p].rows[r].at[c] * roots.at[c];
                part.rows[r].at[c] = above < 0 ? element : above == 0 ? roots.at[c] : T(0);
            }
        }
        tile.store(part, row, column);
    }
}

template <typename T>
DEVICE inline void store_below(const Column<T>& own, const Window<T>& tile,
                               const FactorMemory<T>& memory) {
    UNROLL
    for (int p = 0; p < Square::kRowQuads; ++p) {
        const Quad<T> roots = inverse_roots(Square::row(p), kQuads, memory);
        Part<T> part = own.below[p];
        UNROLL
        for (int r = 0; r < 4; ++r) {
            UNROLL
            for (int c = 0; c < 4; ++c) part.rows[r].at[c] *= roots.at[r];
        }
        tile.store(transposed(part), 4 * Square::column(), 4 * Square::row(p));
    }
}

template <typename T>
DEVICE inline bool can_be_divided_by(T pivot) {
    const T reciprocal = T(1) / pivot;
    return reciprocal > T(0) && reciprocal - reciprocal == T(0);
}

// Notes the item's first failing pivot, by the first warp.
template <typename T>
DEVICE inline void report(int step, int fours, std::int32_t* info, const FactorMemory<T>& memory) {
    if (warp() != 0) return;
    int failing = 4;
    if (lane() < fours) {
        const Quad<T> pivots = memory.pivots[lane()];
        UNROLL
        for (int i = 3; i >= 0; --i) {
            if (!can_be_divided_by(pivots.at[i])) failing = i;
        }
    }
    const std::uint32_t lanes = device::ballot(failing < 4);
    const int first = count_bits((lanes & (0u - lanes)) - 1u);
    if (step == 0 && lanes == 0 && lane() == 0) *info = 0;
    if (lane() == first && (step == 0 || *info == 0)) {
        *info = step * kSide + 4 * first + failing + 1;
    }
}

template <typename T>
DEVICE inline void factor_column(const System<T>& system, int i, int step, std::int32_t* info,
                                 const FactorMemory<T>& memory) {
    const int fours = ceiling_of_division(system.rows(step), 4);
    Column<T> column = {};
    if (step > 0) {
        multiply_tiles(system.tile(step, step - 1), system.tile(i, step - 1), memory,
                       [&](Shared<Quad<T>> left, Shared<Quad<T>> right) {
                           column.add(left, right);
                       });
    }
    column.subtract_from(system.tile(step, step), system.tile(i, step));
    column.eliminate(fours, memory);
    if (i != step) {
        store_below(column, system.tile(i, step), memory);
    } else {
        store_diagonal(column, fours, system.diagonal(step), memory);
        report(step, fours, info, memory);
    }
}

struct Position {
    int row, column;
};

// Of the number-th element of a lower triangle, row by row.
DEVICE inline Position in_lower_triangle(int number) {
    int row = static_cast<int>((std::sqrt(8.0f * static_cast<float>(number) + 1.0f) - 1.0f) / 2.0f);
    while (row * (row + 1) / 2 > number) --row;
    while ((row + 1) * (row + 2) / 2 <= number) ++row;
    return {row, number - row * (row + 1) / 2};
}

// Blocks: items by tiles, first those of the column, on which the next launch waits.
template <typename T>
KERNEL void LAUNCH_BOUNDS(Square::kThreads, sizeof(T) == sizeof(float) ? 3 : 2)
    factor_step(Systems<T> systems, int step) {
    const FactorMemory<T> memory;
    const System<T> system = systems.item(block_x());
    const int number = static_cast<int>(block_y()), in_column = system.tiles() - step;
    if (number < in_column) {
        factor_column(system, step + number, step, systems.info + block_x(), memory);
    } else {
        const Position place = in_lower_triangle(number - in_column);
        update_tile(system, step + 1 + place.row, step + 1 + place.column, step - 1, memory);
    }
}

}  // namespace cholesky
}  // namespace pyeditfast
