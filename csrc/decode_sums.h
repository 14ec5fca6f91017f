// The sums of a warp over the columns of 32 rows of a memory and 16 rows of x, for
// decode_product.cu.
//
// No operand passes through shared memory on its way: the matrix unit's operands are spread over a
// warp such that lane 4 g + t holds row g of W and row g of x at some k that depend on t, and the
// order of k is free. So t's are eight neighbours, 16 bytes of either, which are loaded straight
// into the registers that the matrix unit reads. Products of float32 are the CUDA cores', with the
// same loads.
#pragma once

#include <cstdint>

#include "decode_product.h"
#include "device.h"

namespace pyeditfast {
namespace decode {

using namespace pyeditfast::device;

// Warps that share the columns of a row.
constexpr int kSlices = 4;
constexpr int kRowsOfWarp = 32;
// Of W, in steps of 8: lane 4 g + t has rows g, g + 8, g + 16 and g + 24.
constexpr int kRowsOfThread = 4;
// Pieces of 16 bytes of a row that are on their way to a thread at a time.
constexpr int kStages = 2;
// After so many steps, 512 terms, a sum is moved: the matrix unit cuts off what does not fit, and
// that adds up (see kernels/tile_product.py).
constexpr int kSpan = 8;

// A warp's sums in shared memory, [rows of x, kPitch]: of the lanes that write at once no more than
// two meet in a bank.
constexpr int kPitch = kRowsOfWarp + 8;
constexpr int kTile = kMostRows * kPitch;

struct Operand {
    const void* data;
    std::int64_t row_stride, column_stride;
};

// What a warp multiplies: 32 rows of W from `first_row` on, zeros in place of those beyond d_out,
// and its slice of columns [begin, end). `rows` of x are wanted, as bits; in place of others zeros
// or the first of them is read.
struct Share {
    const Operand& memory;
    const Operand& x;
    int first_row, d_out;
    int begin, end;
    std::uint32_t rows;
    int slice;

    // Row g of W, at the first column; g + 8, g + 16, g + 24 follow `far` elements apart.
    template <typename T>
    DEVICE const T* weights() const {
        return static_cast<const T*>(memory.data) +
               (first_row + lane() / 4) * memory.row_stride + begin * memory.column_stride;
    }
    DEVICE std::int64_t far() const { return 8 * memory.row_stride; }
    // How many of them there are.
    DEVICE int height() const {
        const int rest = d_out - first_row - lane() / 4;
        return rest > 0 ? ceiling_of_division(rest, 8) : 0;
    }
    template <typename T>
    DEVICE const T* token(int row) const {
        const int first = count_bits((rows & (0u - rows)) - 1u);
        return static_cast<const T*>(x.data) +
               ((rows >> row & 1u) != 0 ? row : first) * x.row_stride;
    }
};

// Pieces of 16 bytes of each row of W on their way to a thread.
template <typename T>
class Pieces {
public:
    static constexpr int kPiece = 16 / sizeof(T);
    // Neighbours in a row that a warp reads at a time, and that the warps of a row read in a step.
    static constexpr int kStage = 4 * kPiece;
    static constexpr int kOwn = kStages * kStage;
    static constexpr int kStep = kSlices * kOwn;
    static_assert(kDecodeStep % kStep == 0, "a split has whole steps");

    DEVICE Pieces(const Share& share, int skipped)
        : row_(share.weights<T>() + skipped), far_(share.far()), height_(share.height()) {}
    DEVICE void advance() { row_ += kStep; }
    DEVICE void load(int stage, bool inside) {
        const T* place = row_ + stage * kStage;
        UNROLL
        for (int i = 0; i < kRowsOfThread; ++i) {
            at[stage][i] = load_16_bytes_if(inside && i < height_, place);
            place += far_;
        }
    }

    Words at[kStages][kRowsOfThread];

private:
    const T* row_;
    std::int64_t far_;
    int height_;
};

// The sums of a warp, of 16 rows of x and 32 rows of W. 16 bits, on the matrix unit.
template <int type, bool aligned>
class Sums {
public:
    DEVICE void add(const Share& share) {
        const int skipped = share.slice * Row::kOwn + lane() % 4 * Row::kPiece;
        Row weights(share, skipped);
        const Stored* tokens[2];
        UNROLL
        for (int i = 0; i < 2; ++i) {
            tokens[i] = share.token<Stored>(lane() / 4 + 8 * i) + share.begin + skipped;
        }
        Words x[kStages][2];
        // `left`: columns from those of a step on.
        const auto load = [&](int stage, int left) {
            const bool inside = left - skipped > stage * Row::kStage;
            weights.load(stage, inside);
            UNROLL
            for (int i = 0; i < 2; ++i) {
                x[stage][i] = load_16_bytes_to_keep_if(inside, tokens[i] + stage * Row::kStage);
            }
        };
        int left = share.end - share.begin;
        UNROLL
        for (int stage = 0; stage < kStages; ++stage) load(stage, left);
        NO_UNROLL
        while (left > 0) {
            left -= Row::kStep;
            weights.advance();
            UNROLL
            for (int i = 0; i < 2; ++i) tokens[i] += Row::kStep;
            UNROLL
            for (int stage = 0; stage < kStages; ++stage) {
                multiply(x[stage], weights.at[stage]);
                load(stage, left);
            }
            // Counted from the end, where what is left has to be moved.
            if (left / Row::kStep % kSpan == 0) move();
        }
    }

    DEVICE void store(Shared<float> tile) const {
        const int group = lane() / 4, place = lane() % 4;
        UNROLL
        for (int i = 0; i < kRowsOfThread; ++i) {
            UNROLL
            for (int part = 0; part < 4; ++part) {
                const int row = group + 8 * (part / 2);
                tile[row * kPitch + 8 * i + 2 * place + part % 2] = totals_[i][part];
            }
        }
    }

private:
    using Stored = typename Element<type>::Stored;
    using Row = Pieces<Stored>;
    static_assert(aligned && sizeof(Stored) == 2, "the matrix unit's operands are loaded whole");

    // Four of a thread's eight neighbours stand for a k of 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. W is
    // the right operand, whose registers are two neighbours of what was loaded.
    DEVICE void multiply(const Words (&x)[2], const Words (&w)[kRowsOfThread]) {
        UNROLL
        for (int word = 0; word < 4; word += 2) {
            const std::uint32_t a[4] = {x[0].at[word], x[1].at[word], x[0].at[word + 1],
                                        x[1].at[word + 1]};
            UNROLL
            for (int i = 0; i < kRowsOfThread; ++i) {
                const std::uint32_t b[2] = {w[i].at[word], w[i].at[word + 1]};
                multiply_16x8x16<type>(sums_[i], a, b);
            }
        }
    }
    DEVICE void move() {
        UNROLL
        for (int i = 0; i < kRowsOfThread; ++i) {
            UNROLL
            for (int part = 0; part < 4; ++part) {
                totals_[i][part] += sums_[i][part];
                sums_[i][part] = 0.0f;
            }
        }
    }

    float sums_[kRowsOfThread][4] = {};
    float totals_[kRowsOfThread][4] = {};
};

// On the CUDA cores each of four lanes has its own columns of four rows of W, and all rows of x.
class LaneSums {
public:
    DEVICE void store(Shared<float> tile) const {
        const int group = lane() / 4, place = lane() % 4;
        UNROLL
        for (int i = 0; i < kRowsOfThread; ++i) {
            UNROLL
            for (int row = 0; row < kMostRows; row += 4) {
                // Each lane keeps half of what it has, gives away the other half, and so again.
                const float* const sums = sums_[i] + row;
                float pair[2];
                UNROLL
                for (int j = 0; j < 2; ++j) {
                    const float kept = place < 2 ? sums[j] : sums[j + 2];
                    pair[j] = kept + shuffle_xor(place < 2 ? sums[j + 2] : sums[j], 2);
                }
                const bool even = place % 2 == 0;
                const float own = (even ? pair[0] : pair[1]) +
                                  shuffle_xor(even ? pair[1] : pair[0], 1);
                tile[(row + place) * kPitch + 8 * i + group] = own;
            }
        }
    }

protected:
    // Adds the products of `count` columns: `token` is the first of them in the first row of x.
    // `load` returns those of a row where it is wanted, else zeros. Four rows are skipped if none
    // of them is.
    template <int count, typename T, typename Load>
    DEVICE void multiply(const float (&w)[kRowsOfThread][count], const T* token,
                         std::int64_t row_stride, std::uint32_t rows, const Load& load) {
        UNROLL
        for (int first = 0; first < kMostRows; first += 4) {
            if ((rows >> first & 15u) == 0) {
                token += 4 * row_stride;
                continue;
            }
            float x[4][count];
            UNROLL
            for (int r = 0; r < 4; ++r) {
                load(token, (rows >> (first + r) & 1u) != 0, x[r]);
                token += row_stride;
            }
            UNROLL
            for (int r = 0; r < 4; ++r) {
                UNROLL
                for (int i = 0; i < kRowsOfThread; ++i) {
                    UNROLL
                    for (int c = 0; c < count; ++c) sums_[i][first + r] += w[i][c] * x[r][c];
                }
            }
        }
    }

    float sums_[kRowsOfThread][kMostRows] = {};
};

template <>
class Sums<kFloat32, true> : public LaneSums {
public:
    DEVICE void add(const Share& share) {
        const int skipped = share.slice * Row::kOwn + lane() % 4 * Row::kPiece;
        Row weights(share, skipped);
        const float* tokens = static_cast<const float*>(share.x.data) + share.begin + skipped;
        int left = share.end - share.begin;
        UNROLL
        for (int stage = 0; stage < kStages; ++stage) {
            weights.load(stage, left - skipped > stage * Row::kStage);
        }
        NO_UNROLL
        for (; left > 0; left -= Row::kStep) {
            weights.advance();
            UNROLL
            for (int stage = 0; stage < kStages; ++stage) {
                const bool inside = left - skipped > stage * Row::kStage;
                float w[kRowsOfThread][4];
                UNROLL
                for (int i = 0; i < kRowsOfThread; ++i) split(weights.at[stage][i], w[i]);
                multiply(w, tokens + stage * Row::kStage, share.x.row_stride, share.rows,
                         [&](const float* place, bool wanted, float(&x)[4]) {
                             split(load_16_bytes_to_keep_if(wanted && inside, place), x);
                         });
                weights.load(stage, left - skipped - Row::kStep > stage * Row::kStage);
            }
            tokens += Row::kStep;
        }
    }

private:
    using Row = Pieces<float>;

    DEVICE static void split(const Words& words, float (&numbers)[4]) {
        UNROLL
        for (int i = 0; i < 4; ++i) numbers[i] = float_of(words.at[i]);
    }
};

// Any layout, an element at a time.
template <int type>
class Sums<type, false> : public LaneSums {
public:
    DEVICE void add(const Share& share) {
        using Stored = typename Element<type>::Stored;
        const Stored* const weights = share.weights<Stored>();
        const int height = share.height();
        NO_UNROLL
        for (int k = share.slice * 4 + lane() % 4; k < share.end - share.begin; k += kSlices * 4) {
            float w[kRowsOfThread][1];
            const Stored* place = weights + k * share.memory.column_stride;
            UNROLL
            for (int i = 0; i < kRowsOfThread; ++i) {
                w[i][0] = i < height ? Element<type>::load(*place) : 0.0f;
                place += share.far();
            }
            const Stored* const token = static_cast<const Stored*>(share.x.data) +
                                        (share.begin + k) * share.x.column_stride;
            multiply(w, token, share.x.row_stride, share.rows,
                     [](const Stored* place, bool wanted, float(&x)[1]) {
                         x[0] = wanted ? Element<type>::load(*place) : 0.0f;
                     });
        }
    }
};

}  // namespace decode
}  // namespace pyeditfast
