// Tiles of 64 x 64 numbers, float32 or float64, as the threads of a block share them, and their
// products on the CUDA cores.
//
// A tile is 16 x 16 parts of 4 x 4 numbers, which threads hold in registers. The operands of a
// product pass through shared memory in slabs of 16 steps of the sum, as quads: four neighbours
// along the side of the tile. While a slab is multiplied the next one is on its way from memory.
// A sum starts from zero and takes one fused multiply-add a step, in the order of the steps: its
// bits depend neither on the number of threads nor on what else the block computes.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.h"

namespace pyeditfast {
namespace device {

constexpr int kSide = 64;
constexpr int kQuads = kSide / 4;
constexpr int kSlab = 16;
constexpr int kSlabsOfTile = kSide / kSlab;

// The distance, in quads, of two steps of a slab: odd, so that quads of neighbouring steps, which
// neighbouring threads store, lie in different banks.
HOST_AND_DEVICE constexpr int pitch(int quads) { return quads | 1; }

template <typename T>
struct alignas(16) Quad {
    T at[4];
};

template <typename T>
struct Part {
    Quad<T> rows[4];
};

template <typename T>
DEVICE inline Part<T> transposed(const Part<T>& part) {
    Part<T> result;
    UNROLL
    for (int r = 0; r < 4; ++r) {
        UNROLL
        for (int c = 0; c < 4; ++c) result.rows[r].at[c] = part.rows[c].at[r];
    }
    return result;
}

// How threads share the parts of a tile of 64 rows and 4 `column_quads` columns: each has
// `row_quads` parts of one column of parts. A warp is as square as can be, so that it loads few
// different quads, and these lie side by side: shared memory serves them without conflicts.
template <int row_quads, int column_quads>
struct Sharing {
    static constexpr int kRowQuads = row_quads;
    static constexpr int kColumnQuads = column_quads;
    static constexpr int kDistance = kQuads / row_quads;
    static constexpr int kThreads = kDistance * column_quads;
    static constexpr int kLanesInRow = column_quads < 8 ? column_quads : 8;
    static constexpr int kWarpsInRow = column_quads / kLanesInRow;

    // The row, in quads, of this thread's i-th part, and the column of all of them.
    DEVICE static int row(int i) {
        return warp() / kWarpsInRow * (kWarpSize / kLanesInRow) + lane() / kLanesInRow +
               i * kDistance;
    }
    DEVICE static int column() { return warp() % kWarpsInRow * kLanesInRow + lane() % kLanesInRow; }
};

// A tile of a row-major matrix in global memory. What lies beyond its rows and columns is read as
// zero and not written.
template <typename T>
struct Window {
    T* data;
    std::int64_t stride;
    int rows, columns;
    bool aligned;  // Every row begins at a multiple of 16 bytes.

    // Four neighbours in a row.
    DEVICE Quad<T> along(int row, int column) const {
        return load(at(row, column), row < rows ? columns - column : 0);
    }

    // Four neighbours in a column.
    DEVICE Quad<T> across(int row, int column) const {
        const T* place = at(row, column);
        const int count = column < columns ? rows - row : 0;
        Quad<T> quad;
        UNROLL
        for (int i = 0; i < 4; ++i, place += stride) quad.at[i] = i < count ? *place : T(0);
        return quad;
    }

    DEVICE Part<T> part(int row, int column) const {
        const T* place = at(row, column);
        Part<T> part;
        UNROLL
        for (int r = 0; r < 4; ++r, place += stride) {
            part.rows[r] = load(place, row + r < rows ? columns - column : 0);
        }
        return part;
    }

    DEVICE void store(const Part<T>& part, int row, int column) const {
        T* place = at(row, column);
        UNROLL
        for (int r = 0; r < 4; ++r, place += stride) {
            store(part.rows[r], place, row + r < rows ? columns - column : 0);
        }
    }

    // The same without what is above the diagonal.
    DEVICE void store_lower(const Part<T>& part, int row, int column) const {
        T* place = at(row, column);
        UNROLL
        for (int r = 0; r < 4; ++r, place += stride) {
            store(part.rows[r], place, row + r < rows ? row + r + 1 - column : 0);
        }
    }

private:
    DEVICE T* at(int row, int column) const { return data + row * stride + column; }

    // Four neighbours, of which `count` are inside.
    DEVICE Quad<T> load(const T* place, int count) const {
        if (aligned && count >= 4) return *reinterpret_cast<const Quad<T>*>(place);
        Quad<T> quad;
        UNROLL
        for (int i = 0; i < 4; ++i) quad.at[i] = i < count ? place[i] : T(0);
        return quad;
    }
    DEVICE void store(const Quad<T>& quad, T* place, int count) const {
        if (aligned && count >= 4) {
            *reinterpret_cast<Quad<T>*>(place) = quad;
            return;
        }
        UNROLL
        for (int i = 0; i < 4; ++i) {
            if (i < count) place[i] = quad.at[i];
        }
    }
};

// One operand of a product on its way from global to shared memory: slab element (step, quad) is
// four rows of the window's column `step`, or, unless `across`, four columns of its row `step`.
template <typename T, bool across, int quads, int threads>
class Operand {
public:
    static constexpr int kPitch = pitch(quads);
    static constexpr int kSize = kSlab * kPitch;

    DEVICE void fetch(const Window<T>& window, int first_step) {
        UNROLL
        for (int i = 0; i < kHeld; ++i) {
            if constexpr (across) {
                held_[i] = window.across(4 * quad(i), first_step + step(i));
            } else {
                held_[i] = window.along(first_step + step(i), 4 * quad(i));
            }
        }
    }
    DEVICE void store(Shared<Quad<T>> slab) const {
        UNROLL
        for (int i = 0; i < kHeld; ++i) slab[step(i) * kPitch + quad(i)] = held_[i];
    }

private:
    static constexpr int kHeld = kSlab * quads / threads;
    static_assert(kHeld * threads == kSlab * quads, "every thread has as many quads");

    // Neighbouring threads read neighbours in memory.
    DEVICE static int step(int i) {
        const int number = thread() + i * threads;
        return across ? number % kSlab : number / quads;
    }
    DEVICE static int quad(int i) {
        const int number = thread() + i * threads;
        return across ? number / kSlab : number % quads;
    }

    Quad<T> held_[kHeld];
};

// part += left rightᵀ
template <typename T>
DEVICE inline void add_product(Part<T>& part, const Quad<T>& left, const Quad<T>& right) {
    UNROLL
    for (int r = 0; r < 4; ++r) {
        UNROLL
        for (int c = 0; c < 4; ++c) {
            part.rows[r].at[c] = std::fma(left.at[r], right.at[c], part.rows[r].at[c]);
        }
    }
}

// part -= left rightᵀ
template <typename T>
DEVICE inline void subtract_product(Part<T>& part, const Quad<T>& left, const Quad<T>& right) {
    UNROLL
    for (int r = 0; r < 4; ++r) {
        UNROLL
        for (int c = 0; c < 4; ++c) {
            part.rows[r].at[c] = std::fma(-left.at[r], right.at[c], part.rows[r].at[c]);
        }
    }
}

template <typename T>
DEVICE inline Part<T> operator-(const Part<T>& a, const Part<T>& b) {
    Part<T> result;
    UNROLL
    for (int r = 0; r < 4; ++r) {
        UNROLL
        for (int c = 0; c < 4; ++c) result.rows[r].at[c] = a.rows[r].at[c] - b.rows[r].at[c];
    }
    return result;
}

// sums += leftᵀ right, for one slab of each.
template <typename Threads, typename T>
DEVICE inline void add_slab(Part<T> (&sums)[Threads::kRowQuads], const Shared<Quad<T>>& left,
                            const Shared<Quad<T>>& right) {
    for (int step = 0; step < kSlab; ++step) {
        const Quad<T> column = right[step * pitch(Threads::kColumnQuads) + Threads::column()];
        UNROLL
        for (int i = 0; i < Threads::kRowQuads; ++i) {
            const Quad<T> row = left[step * pitch(kQuads) + Threads::row(i)];
            add_product(sums[i], row, column);
        }
    }
}

// Runs through slabs: fetch(slab) into registers, store(slab) to one of two places in shared
// memory, multiply(slab) from there.
template <typename Fetch, typename Store, typename Multiply>
DEVICE inline void run_through(int slabs, const Fetch& fetch, const Store& store,
                               const Multiply& multiply) {
    fetch(0);
    store(0);
    barrier();
    for (int slab = 0; slab < slabs; ++slab) {
        const bool more = slab + 1 < slabs;
        if (more) fetch(slab + 1);
        multiply(slab);
        // The other place is free: the barrier came after the last product from it.
        if (more) store(slab + 1);
        barrier();
    }
}

}  // namespace device
}  // namespace pyeditfast
