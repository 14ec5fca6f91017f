// Batched Cholesky factorization and solution on a CUDA device, in tiles of 64 x 64.
//
// Factorization (cholesky_factor.h), right-looking, one launch a column of tiles. A launch brings
// the tiles right of the last finished column up to date, and finishes the next column as well: its
// blocks, one for each tile from the diagonal down, all factor the tile on the diagonal for
// themselves, which takes no longer than if one did, and carry the same row operations over to
// their own tile. So from column to column it is one launch, and the other tiles fill the device
// meanwhile.
//
// Elimination takes four pivots between two barriers, as L D Lᵀ: one reciprocal a pivot is all that
// the next pivot waits for, and the square roots are taken at the end, all at once.
//
// Substitution (cholesky_substitution.h), one launch: a block carries its columns through all rows,
// forward and back.
//
// Two choices keep residuals as small as LAPACK's (float32, emulated). No tile on the diagonal is
// inverted, though products with the inverse would need fewer barriers: they lose up to the
// condition number of that tile. With inverses (simulated) residuals were 100 times LAPACK's where
// a tile is like Hilbert's matrix and 5 times where pairs of keys are equal but for 1 %; now they
// are 1.5 and 1.3 times. And every sum starts from zero and is subtracted as a whole: with one
// product subtracted after the other the error at n = 257 was 2.4 times LAPACK's, now it is 0.9
// times.
//
// Products run on the CUDA cores. Tensor cores need each float32 as three bf16 parts and six
// products, so at 15 times the rate of float32 (H200) they would be 2.5 times as fast at best, less
// the splitting; below n = 2048 launches and latency take most of the time. From there on it would
// be the next thing to try: split a column into its parts when it is finished, and update with
// multiply_16x8x16. For float64 the H200's tensor cores have twice the rate (mma.m8n8k4).
//
// What to expect of an H200 (60 TFLOP/s in float32, half of that in float64; 1.9 GHz). No GPU has
// measured any of it.
//
//   a launch    10 us: 2 from launch to launch, 3 for products, 4 for 64 pivots
//   n = 400     7 launches, 70 us;   2 x 4096 columns, 2.6 GFLOP, 95 us
//   n = 1024    16 launches, 160 us; 2 x 4096 columns, 17 GFLOP, 450 us
//   n = 4096    64 launches, 46 GFLOP for 2 items, 1.5 ms; 2 x 4096 columns, 275 GFLOP, 6.5 ms
//
// A product of tiles, 0.5 MFLOP, reads 32 KB (float32) of the L2 cache: 16 FLOP a byte, 4 TB/s at
// the full rate. DRAM hardly matters.
#include "cholesky_solve.h"

#include <cstdio>

#include "cholesky_factor.h"
#include "cholesky_substitution.h"
#include "device.h"

namespace {

using namespace pyeditfast::device;
using pyeditfast::fail;
using pyeditfast::kInvalidArgument;
using pyeditfast::kOk;
using pyeditfast::Message;
using pyeditfast::cholesky::factor_step;
using pyeditfast::cholesky::FactorMemory;
using pyeditfast::cholesky::Square;
using pyeditfast::cholesky::substitute;
using pyeditfast::cholesky::SubstitutionMemory;
using pyeditfast::cholesky::Systems;

// 256 x 257 / 2 tiles and as many items are few enough for a grid.
constexpr std::int64_t kMostRows = 16384;
constexpr std::int64_t kMostItems = 65535;
constexpr std::int64_t kMostColumns = std::int64_t{1} << 30;

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
