// The host's side of decode_product.cu: what it takes, and how the work is cut.
#include "decode_product.h"

#include <algorithm>
#include <cstdio>

#include "activations.h"

namespace pyeditfast {
namespace {

constexpr std::int64_t kRowsOfBlock = 64;
constexpr std::int64_t kRowsOfWarp = 32;
constexpr int kMostSplitsInBlock = 4;
constexpr std::int64_t kRowsOfFewColumns = 8;

// Two blocks for each of an H200's multiprocessors. An estimate that only costs speed where it is
// wrong, and the same on every GPU, so that all give the same bits.
constexpr std::int64_t kBlocksAtOnce = 264;
// Starting a block costs as much as this many columns of a memory; an estimate.
constexpr std::int64_t kStartCost = 256;
constexpr std::int64_t kFewestColumns = 512;

constexpr std::int64_t kMostSize = std::int64_t{1} << 30;

std::int64_t ceiling_of_division(std::int64_t count, std::int64_t size) {
    return (count + size - 1) / size;
}

// Into how many parts d_in is cut: what makes the columns fewest that blocks read one after the
// other.
std::int64_t choose_splits(const pyeditfast_decode& decode) {
    if (decode.splits > 0) return decode.splits;
    const std::int64_t tiles = ceiling_of_division(decode.d_out, kRowsOfBlock);
    const std::int64_t most = std::min<std::int64_t>(kMostSplits, decode.d_in / kFewestColumns);
    std::int64_t best = 1;
    double least = 0.0;
    for (std::int64_t splits = 1; splits <= most; ++splits) {
        const auto rounds = static_cast<double>(ceiling_of_division(tiles * splits, kBlocksAtOnce));
        const double columns = static_cast<double>(decode.d_in) / static_cast<double>(splits);
        const double cost = rounds * (columns + static_cast<double>(kStartCost));
        if (splits == 1 || cost < least) {
            best = splits;
            least = cost;
        }
    }
    return best;
}

bool rows_are_aligned(const pyeditfast_matrix& matrix, std::int64_t rows) {
    return matrix.column_stride == 1 && reinterpret_cast<std::uintptr_t>(matrix.data) % 16 == 0 &&
           (rows <= 1 || matrix.row_stride * element_size(matrix.type) % 16 == 0);
}

bool memories_are_aligned(const pyeditfast_decode& decode) {
    if (decode.d_in == 0 || decode.d_in * element_size(decode.main->type) % 16 != 0) return false;
    for (int i = 0; i < decode.memories; ++i) {
        if (!rows_are_aligned(decode.sides[i], decode.d_out)) return false;
    }
    return rows_are_aligned(*decode.main, decode.d_out);
}

int check_of_type(const char* name, const pyeditfast_matrix* matrix, std::int64_t rows,
                  std::int64_t columns, int type, Message message) {
    const int status = check_matrix(name, matrix, rows, columns, false, message);
    if (status != kOk || matrix->type == type) return status;
    return fail(kInvalidArgument, message, "%s has element type %d, main has %d", name,
                matrix->type, type);
}

}  // namespace

int check_activation(const char* name, int activation, Message message) {
    if (activation >= kNoActivation && activation <= kGeluTanh) return kOk;
    return fail(kInvalidArgument, message, "%s must be from 0 to 4, got %d", name, activation);
}

int check_decode(const pyeditfast_decode* decode, Message message) {
    if (decode == nullptr) return fail(kInvalidArgument, message, "decode is missing");
    const std::int64_t batch = decode->batch, d_out = decode->d_out, d_in = decode->d_in;
    if (batch < 0 || batch > kMostRows) {
        return fail(kInvalidArgument, message, "batch must be from 0 to %d, got %lld", kMostRows,
                    static_cast<long long>(batch));
    }
    if (d_out < 0 || d_in < 0 || d_out > kMostSize || d_in > kMostSize) {
        return fail(kInvalidArgument, message,
                    "d_out and d_in must be from 0 to 2^30, got %lld and %lld",
                    static_cast<long long>(d_out), static_cast<long long>(d_in));
    }
    if (decode->memories < 0 || decode->memories > kMostSides) {
        return fail(kInvalidArgument, message, "there are %d side memories; 0 to %d are taken",
                    decode->memories, kMostSides);
    }
    if (decode->splits < 0 || decode->splits > kMostSplits) {
        return fail(kInvalidArgument, message, "splits must be from 0 to %d, got %d", kMostSplits,
                    decode->splits);
    }
    if (decode->memories > 0 && decode->sides == nullptr) {
        return fail(kInvalidArgument, message, "sides is a null pointer, but there are %d",
                    decode->memories);
    }
    int status = check_matrix("main", decode->main, d_out, d_in, false, message);
    if (status != kOk) return status;
    const int type = decode->main->type;
    status = check_of_type("x", decode->x, batch, d_in, type, message);
    if (status == kOk && decode->gate != nullptr) {
        status = check_of_type("gate", decode->gate, batch, d_in, type, message);
        if (status == kOk) {
            status = check_activation("gate_activation", decode->gate_activation, message);
        }
    }
    if (status == kOk && decode->bias != nullptr) {
        status = check_of_type("bias", decode->bias, 1, d_out, type, message);
    }
    for (int i = 0; i < decode->memories && status == kOk; ++i) {
        char name[24];
        std::snprintf(name, sizeof name, "sides[%d]", i);
        status = check_of_type(name, decode->sides + i, d_out, d_in, type, message);
    }
    return status;
}

int check_decode_workspace(const void* workspace, Message message) {
    if (workspace != nullptr && reinterpret_cast<std::uintptr_t>(workspace) % 16 == 0) return kOk;
    return fail(kInvalidArgument, message, "workspace is at %p; a multiple of 16 is needed",
                workspace);
}

DecodeSizes decode_sizes(const pyeditfast_decode& decode) {
    DecodeSizes sizes;
    std::snprintf(sizes.text, sizeof sizes.text, "%lld rows, %d side memories of %lld x %lld",
                  static_cast<long long>(decode.batch), decode.memories,
                  static_cast<long long>(decode.d_out), static_cast<long long>(decode.d_in));
    return sizes;
}

DecodeCut cut_decode(const pyeditfast_decode& decode, int multiprocessors) {
    DecodeCut cut = {};
    cut.aligned = memories_are_aligned(decode);
    cut.packed = decode.gate != nullptr ||
                 (cut.aligned && !rows_are_aligned(*decode.x, decode.batch));
    const std::int64_t columns = ceiling_of_division(decode.d_in, choose_splits(decode));
    cut.chunk = std::max<std::int64_t>(1, ceiling_of_division(columns, kDecodeStep)) * kDecodeStep;
    cut.splits = static_cast<int>(
        std::max<std::int64_t>(1, ceiling_of_division(decode.d_in, cut.chunk)));
    // Few rows of x are worth being read for every 32 rows of a memory, and then a block can take
    // all splits, if all such blocks are at once on the chip: no parts, and no second kernel.
    const std::int64_t narrow_blocks = ceiling_of_division(decode.d_out, kRowsOfWarp);
    const bool whole = decode.batch <= kRowsOfFewColumns && cut.splits <= kMostSplitsInBlock &&
                       narrow_blocks <= multiprocessors * (kMostSplitsInBlock / cut.splits);
    cut.splits_in_block = whole ? cut.splits : 1;
    cut.row_groups = cut.splits_in_block > 1 ? 1 : 2;
    cut.blocks_of_rows = ceiling_of_division(decode.d_out, cut.row_groups * kRowsOfWarp);
    return cut;
}

std::int64_t decode_workspace(const pyeditfast_decode* decode, bool has_route) {
    if (check_decode(decode, {nullptr, 0}) != kOk) return 0;
    constexpr std::int64_t kFloat = 4;
    // Rows of x begin at multiples of 16 bytes.
    const std::int64_t x = decode->batch * ceiling_of_division(decode->d_in, 8) * 8;
    const std::int64_t slabs = has_route ? 1 : 1 + decode->memories;
    return kFloat * (x + slabs * choose_splits(*decode) * decode->batch * decode->d_out);
}

}  // namespace pyeditfast
