// The kernel that substitutes, see cholesky_solve.cu.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "cholesky_system.h"
#include "device.h"
#include "tile_products.h"

namespace pyeditfast {
namespace cholesky {

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

}  // namespace cholesky
}  // namespace pyeditfast
