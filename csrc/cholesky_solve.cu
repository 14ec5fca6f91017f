// Batched Cholesky factorization and solution on a CUDA device, in blocks of 64.
//
// Factorization, right-looking, one launch a block column. A launch brings what lies right of the
// last column up to date, tile by tile, and in the same launch finishes the next column: its blocks,
// one for each tile from the diagonal down, all factor the 64 x 64 block on the diagonal for
// themselves, which takes no longer than if one did, and carry the same row operations over to their
// own tile. So the way from column to column is one launch, and the other tiles fill the device
// meanwhile.
//
// Elimination takes four pivots between two barriers, as L D Lᵀ: one reciprocal a pivot is all that
// the next pivot waits for, and the square roots are taken at the end, all at once.
//
// Substitution, one launch: a block carries its columns through all rows, forward and back.
//
// No inverse of a diagonal block is formed, though products with it need fewer barriers. Its
// products lose up to the condition number of that block, which substitution does not: of a block
// like Hilbert's the residual is 100 times LAPACK's, of equal keys but for 1 % it is 6 times
// (substitution: 2 and 3 times). As the operands pass through shared memory in slabs anyway, the 64
// rows take 16 barriers, about as long as the product they replace.
//
// Products run on the CUDA cores. Tensor cores need each float32 as three bf16 parts and six
// products, so their rate, 15 times that of float32 on an H200, would be 2.5 times at best, less the
// splitting; below n = 2048 launches and latency take most of the time. From there on it would be
// the next thing to try: split a column when it is finished, and update with `multiply_16x8x16`.
//
// Expected on an H200 (60 TFLOP/s float32, 1.9 GHz); no GPU has measured any of this:
//   a launch           about 10 us: 2 between launches, 3 for products, 4 for 16 times 4 pivots
//   n = 400            7 + 1 launches, 70 us, and 4096 columns of 2 items 2.6 GFLOP, 90 us
//   n = 1024           16 + 1 launches, 160 us, and 4096 columns of 2 items 17 GFLOP, 500 us
//   n = 4096           64 + 1 launches, 46 GFLOP for 2 items, 1.5 ms; 4096 columns 275 GFLOP, 7 ms
// Bytes do not matter: a substitution reads 32 KB of the L2 cache for 0.5 MFLOP, 16 FLOP a byte.
#include "cholesky_solve.h"

#include <cmath>
#include <cstdio>

#include "device.h"
#include "tile_products.h"

namespace {

using namespace pyeditfast::device;
using pyeditfast::fail;
using pyeditfast::kInvalidArgument;
using pyeditfast::kOk;
using pyeditfast::Message;

// As many tiles as a grid has places for.
constexpr std::int64_t kMostRows = 16384;
constexpr std::int64_t kMostItems = 65535;
constexpr std::int64_t kMostColumns = std::int64_t{1} << 30;

// One system: the tiles of G, from which L takes over column by column, and apart from them, since
// several blocks read those of G, the blocks on the diagonal of L: with the reciprocals of their
// diagonals, which is how substitution needs them.
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
    const std::uint32_t lanes = pyeditfast::device::ballot(failing < 4);
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

// What a block that substitutes has in shared memory.
template <typename T, typename Columns>
struct SubstitutionMemory {
    static constexpr int kLeft = kSlab * pitch(kQuads);
    static constexpr int kRight = kSlab * pitch(Columns::kColumnQuads);
    static constexpr int kSolved = 4 * Columns::kColumnQuads;
    static constexpr std::size_t kBytes = 2 * (kLeft + kRight + kSolved) * sizeof(Quad<T>);

    SharedMemory memory;
    Shared<Quad<T>> left = memory.take<Quad<T>>(2 * kLeft);
    Shared<Quad<T>> right = memory.take<Quad<T>>(2 * kRight);
    Shared<Quad<T>> solved = memory.take<Quad<T>>(2 * kSolved);
};

// Forward: the rows of block k of L Y = B, those above being known; else of Lᵀ X = Y from below.
template <typename T, typename Columns, bool forward>
struct Substitution {
    using Memory = SubstitutionMemory<T, Columns>;
    using Left = Operand<T, forward, kQuads, Columns::kThreads>;
    using Right = Operand<T, false, Columns::kColumnQuads, Columns::kThreads>;

    const System<T>& system;
    const Memory& memory;
    std::int64_t first_column;
    // Sums of what is known, then the rows of block k.
    Part<T> parts[Columns::kRowQuads];

    DEVICE void run(int k) {
        const int known = kSlabsOfTile * (forward ? k : system.tiles() - 1 - k);
        const int own = ceiling_of_division(system.rows(k), kSlab);
        Left left;
        Right right;
        UNROLL
        for (int p = 0; p < Columns::kRowQuads; ++p) parts[p] = Part<T>{};
        run_through(
            known + own,
            [&](int slab) {
                if (slab < known) {
                    const int step = slab % kSlabsOfTile * kSlab;
                    const int j = slab / kSlabsOfTile + (forward ? 0 : k + 1);
                    left.fetch(forward ? system.tile(k, j) : system.tile(j, k), step);
                    right.fetch(solution(j), step);
                } else {
                    left.fetch(system.diagonal(k), own_slab(slab - known, own) * kSlab);
                }
            },
            [&](int slab) {
                left.store(memory.left + slab % 2 * Memory::kLeft);
                if (slab < known) right.store(memory.right + slab % 2 * Memory::kRight);
            },
            [&](int slab) {
                const Shared<Quad<T>> shown = memory.left + slab % 2 * Memory::kLeft;
                if (slab < known) {
                    add_slab<Columns>(parts, shown, memory.right + slab % 2 * Memory::kRight);
                } else {
                    if (slab == known) subtract_from_rows(k);
                    solve_slab(k, own_slab(slab - known, own), shown);
                }
            });
    }

private:
    DEVICE static int own_slab(int number, int own) { return forward ? number : own - 1 - number; }

    DEVICE Window<T> solution(int i) const {
        return system.solution(i, first_column, 4 * Columns::kColumnQuads);
    }

    DEVICE void subtract_from_rows(int k) {
        UNROLL
        for (int p = 0; p < Columns::kRowQuads; ++p) {
            parts[p] = solution(k).part(4 * Columns::row(p), 4 * Columns::column()) - parts[p];
        }
    }

    // The rows of block k that a slab of the block on the diagonal is about, four at a time.
    DEVICE void solve_slab(int k, int slab, const Shared<Quad<T>>& diagonal) {
        constexpr int kFours = kSlab / 4;
        const int fours = ceiling_of_division(system.rows(k), 4);
        for (int number = 0; number < kFours; ++number) {
            const int in_slab = forward ? number : kFours - 1 - number;
            const int four = slab * kFours + in_slab;
            if (four < fours) solve_four(k, four, diagonal + 4 * in_slab * Left::kPitch);
        }
    }

    DEVICE void solve_four(int k, int four, const Shared<Quad<T>>& diagonal) {
        const Shared<Quad<T>> solved = memory.solved + four % 2 * Memory::kSolved;
        UNROLL
        for (int p = 0; p < Columns::kRowQuads; ++p) {
            if (Columns::row(p) != four) continue;
            solve_part(parts[p], four, diagonal);
            UNROLL
            for (int r = 0; r < 4; ++r) {
                solved[r * Columns::kColumnQuads + Columns::column()] = parts[p].rows[r];
            }
        }
        barrier();
        UNROLL
        for (int p = 0; p < Columns::kRowQuads; ++p) {
            const int row = Columns::row(p);
            if (row == four) solution(k).store(parts[p], 4 * four, 4 * Columns::column());
            if (forward ? row <= four : row >= four) continue;
            Part<T> product = {};
            UNROLL
            for (int step = 0; step < 4; ++step) {
                const Quad<T> left = diagonal[step * Left::kPitch + row];
                const Quad<T> right = solved[step * Columns::kColumnQuads + Columns::column()];
                add_product(product, left, right);
            }
            parts[p] = parts[p] - product;
        }
    }

    DEVICE static void solve_part(Part<T>& part, int four, const Shared<Quad<T>>& diagonal) {
        UNROLL
        for (int number = 0; number < 4; ++number) {
            const int row = forward ? number : 3 - number;
            const Quad<T> column = diagonal[row * Left::kPitch + four];
            UNROLL
            for (int c = 0; c < 4; ++c) part.rows[row].at[c] *= column.at[row];
            UNROLL
            for (int r = 0; r < 4; ++r) {
                if (forward ? r <= row : r >= row) continue;
                UNROLL
                for (int c = 0; c < 4; ++c) {
                    part.rows[r].at[c] =
                        std::fma(-column.at[r], part.rows[row].at[c], part.rows[r].at[c]);
                }
            }
        }
    }
};

template <typename T>
DEVICE inline void fill_with_nan(const System<T>& system, std::int64_t first_column, int width) {
    const Window<T> all = system.solution(0, first_column, width);
    for (int row = thread() / width; row < system.n; row += threads() / width) {
        const int column = thread() % width;
        if (column < all.columns) all.data[row * all.stride + column] = T(NAN);
    }
}

// Blocks: columns by items, so that blocks side by side read the same tiles of L.
template <typename T, typename Columns>
KERNEL void LAUNCH_BOUNDS(Columns::kThreads, sizeof(T) == sizeof(float) ? 3 : 2)
    substitute(Systems<T> systems) {
    constexpr int kWidth = 4 * Columns::kColumnQuads;
    const SubstitutionMemory<T, Columns> memory;
    const System<T> system = systems.item(block_y());
    const std::int64_t first_column = block_x() * kWidth;
    if (systems.info[block_y()] != 0) {
        fill_with_nan(system, first_column, kWidth);
        return;
    }
    Substitution<T, Columns, true> down = {system, memory, first_column, {}};
    for (int k = 0; k < system.tiles(); ++k) down.run(k);
    Substitution<T, Columns, false> up = {system, memory, first_column, {}};
    for (int k = system.tiles() - 1; k >= 0; --k) up.run(k);
}

struct Call {
    void* gram;
    void* rhs;
    std::int64_t items, n, columns;
    std::int32_t* info;
    void* workspace;
    const pyeditfast_stream& stream;
    Message message;
    const char* sizes;

    template <typename T>
    Systems<T> systems() const {
        const auto aligned = [](const void* start, std::int64_t row) {
            return reinterpret_cast<std::uintptr_t>(start) % 16 == 0 &&
                   row * static_cast<std::int64_t>(sizeof(T)) % 16 == 0;
        };
        return {{static_cast<T*>(gram), static_cast<T*>(workspace), static_cast<T*>(rhs),
                 static_cast<int>(n), columns, aligned(gram, n), aligned(rhs, columns)},
                info};
    }

    template <typename T>
    int run() const {
        int status = kOk;
        const std::int64_t tiles = ceiling_of_division<std::int64_t>(n, kSide);
        for (std::int64_t step = 0; step < tiles && status == kOk; ++step) {
            const std::int64_t rest = tiles - step - 1;
            const Grid grid = {items, rest + 1 + (step == 0 ? 0 : rest * (rest + 1) / 2)};
            status = launch("cholesky_solve", sizes, factor_step<T>, grid, Square::kThreads,
                            FactorMemory<T>::kBytes, stream, message, systems<T>(),
                            static_cast<int>(step));
        }
        if (status != kOk) return status;
        // Narrow blocks where wide ones would be of a few columns, or too few for the device.
        const std::int64_t wide = ceiling_of_division<std::int64_t>(columns, kSide) * items;
        const bool narrow = columns <= kSide / 4 || 2 * wide <= multiprocessors(stream);
        return narrow ? substitute_in<T, Sharing<1, 4>>() : substitute_in<T, Square>();
    }

    template <typename T, typename Columns>
    int substitute_in() const {
        const Grid grid = {ceiling_of_division<std::int64_t>(columns, 4 * Columns::kColumnQuads),
                           items};
        return launch("cholesky_solve", sizes, substitute<T, Columns>, grid, Columns::kThreads,
                      SubstitutionMemory<T, Columns>::kBytes, stream, message, systems<T>());
    }
};

int check_number(const char* name, std::int64_t number, std::int64_t most, Message message) {
    if (number >= 0 && number <= most) return kOk;
    return fail(kInvalidArgument, message, "%s must be from 0 to %lld, got %lld", name,
                static_cast<long long>(most), static_cast<long long>(number));
}

int check_address(const char* name, const void* address, int multiple, Message message) {
    if (address == nullptr) return fail(kInvalidArgument, message, "%s is a null pointer", name);
    if (reinterpret_cast<std::uintptr_t>(address) % static_cast<unsigned>(multiple) == 0) {
        return kOk;
    }
    return fail(kInvalidArgument, message, "%s is at %p, which is no multiple of %d", name, address,
                multiple);
}

int check(const Call& call, int element_bits) {
    const Message message = call.message;
    if (element_bits != 32 && element_bits != 64) {
        return fail(kInvalidArgument, message, "element_bits must be 32 or 64, got %d",
                    element_bits);
    }
    int status = check_number("items", call.items, kMostItems, message);
    if (status == kOk) status = check_number("n", call.n, kMostRows, message);
    if (status == kOk) status = check_number("columns", call.columns, kMostColumns, message);
    if (status != kOk || call.items == 0 || call.n == 0 || call.columns == 0) return status;
    status = check_address("gram", call.gram, element_bits / 8, message);
    if (status == kOk) status = check_address("rhs", call.rhs, element_bits / 8, message);
    if (status == kOk) status = check_address("info", call.info, sizeof(std::int32_t), message);
    if (status == kOk) status = check_address("workspace", call.workspace, 16, message);
    return status;
}

}  // namespace

extern "C" std::int64_t pyeditfast_cuda_cholesky_solve_workspace(int element_bits,
                                                                 std::int64_t items,
                                                                 std::int64_t n) {
    return items * ceiling_of_division<std::int64_t>(n, kSide) * kSide * kSide * element_bits / 8;
}

extern "C" int pyeditfast_cuda_cholesky_solve(void* gram, void* rhs, int element_bits,
                                              std::int64_t items, std::int64_t n,
                                              std::int64_t columns, std::int32_t* info,
                                              void* workspace, pyeditfast_stream stream,
                                              char* message_text, std::size_t message_size) {
    char sizes[96];
    std::snprintf(sizes, sizeof sizes, "%lld systems of %lld x %lld with %lld columns",
                  static_cast<long long>(items), static_cast<long long>(n),
                  static_cast<long long>(n), static_cast<long long>(columns));
    const Call call = {gram,      rhs,    items,
                       n,         columns, info,
                       workspace, stream, {message_text, message_size},
                       sizes};
    const int status = check(call, element_bits);
    if (status != kOk || items == 0 || n == 0 || columns == 0) return status;
    return element_bits == 32 ? call.run<float>() : call.run<double>();
}
