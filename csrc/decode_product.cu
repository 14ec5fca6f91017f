// Products of single tokens and memories on a CUDA device.
//
// A block owns 32 or 64 rows of W and a part of d_in. It goes through the memories, past those that
// no row of x uses without reading them; so all rows of a memory share one read of it, and blocks
// have the same work whichever memories are in use. A warp has 32 rows of W and every fourth piece
// of their columns; the four are added through shared memory in a fixed order.
//
// Floor: d_out d_in elements of every memory in use; one bf16 memory of 4096 x 14336 has 117 MB,
// 24.5 us at an H200's 4.8 TB/s. What to expect there, not measured: 28 us up to 8 rows, and beyond
// 30 and 3 for a second kernel; 3 more with a gate. Why:
//  - 512 threads a multiprocessor, each with 64 to 128 bytes of W on their way, make 32 to 64 KB;
//    28 KB would do for loads of 800 ns.
//  - Rows of x come from the L2 cache, once for 64 rows of W: at 16 rows a quarter of the bytes of
//    W, half of that where the two blocks of a multiprocessor share them in the L1. Up to 8 rows a
//    block may have 32 rows of W and all of d_in: a quarter again, but no parts.
//  - The parts are 8 splits batch d_out bytes, 2 % of W at 16 rows, and stay in the L2.
//  - A warp's loop has 160 instructions for 4 KB of W, a quarter of what can be issued meanwhile;
//    the matrix unit is busy for a tenth of the time.
//  - float32 at 16 rows: with the loads of x beside 16 multiplications an element of W, issuing
//    takes about as long as reading. Four rows that no memory wants cost nothing.
#include "decode_product.h"

#include <cstdint>

#include "decode_sums.h"
#include "device.h"
#include "device_activations.h"
#include "device_elements.h"

namespace {

using namespace pyeditfast::decode;
using pyeditfast::DecodeCut;
using pyeditfast::kBFloat16;
using pyeditfast::kFloat16;
using pyeditfast::kFloat32;
using pyeditfast::kMostRows;
using pyeditfast::kMostSides;
using pyeditfast::kOk;
using pyeditfast::Message;
using pyeditfast::Strided;

constexpr int kMostThreads = 512;
constexpr int kThreadsOfPack = 256;

struct Arguments {
    Operand x;
    Operand memories[1 + kMostSides];
    Operand bias;  // A row, or null.
    Strided<const std::int64_t> route;
    void* output;  // Null: the parts are wanted.
    float* parts;
    int d_out, d_in, chunk;
    int batch, memories_count;
    int splits_of_grid, splits_in_block, row_groups;
};

// What stays the same from memory to memory, kept in shared memory: while products are added the
// sums take all registers.
struct Kept {
    int split;
    int first_row;
};

// The memory that answers a row of x, 0 being the main memory.
DEVICE inline int memory_of(const Arguments& arguments, int row) {
    if (arguments.route.data == nullptr) return 0;
    const std::int64_t number = arguments.route.data[row * arguments.route.stride];
    return number >= 0 && number + 1 < arguments.memories_count ? static_cast<int>(number) + 1 : 0;
}

DEVICE inline Share share_of(const Arguments& arguments, int memory, std::uint32_t rows,
                             const Kept& place) {
    const int slice = warp() % kSlices, group = warp() / kSlices;
    const int split = place.split * arguments.splits_in_block + group / arguments.row_groups;
    const int begin = split * arguments.chunk;
    return {arguments.memories[memory],
            arguments.x,
            place.first_row + group % arguments.row_groups * kRowsOfWarp,
            arguments.d_out,
            begin,
            begin + arguments.chunk < arguments.d_in ? begin + arguments.chunk : arguments.d_in,
            rows,
            slice};
}

// Adds what the warps of a block have summed of a memory, and writes it.
template <int type>
DEVICE inline void write(const Arguments& arguments, Shared<float> tiles, int memory,
                         std::uint32_t rows, const Kept& place) {
    const int height = arguments.row_groups * kRowsOfWarp;
    const int out = thread() % height;
    const std::int64_t column = place.first_row + out;
    if (column >= arguments.d_out) return;
    for (int row = thread() / height; row < kMostRows; row += threads() / height) {
        if ((rows >> row & 1u) == 0) continue;
        float total = 0.0f;
        for (int split = 0; split < arguments.splits_in_block; ++split) {
            const int group = split * arguments.row_groups + out / kRowsOfWarp;
            float sum = 0.0f;
            UNROLL
            for (int slice = 0; slice < kSlices; ++slice) {
                const float one = tiles[(group * kSlices + slice) * kTile + row * kPitch +
                                        out % kRowsOfWarp];
                sum += one;
            }
            total += sum;
        }
        if (arguments.output != nullptr) {
            if (arguments.bias.data != nullptr) {
                total += load_element(arguments.bias.data, column * arguments.bias.column_stride,
                                      type);
            }
            using Stored = typename Element<type>::Stored;
            static_cast<Stored*>(arguments.output)[std::int64_t{row} * arguments.d_out + column] =
                Element<type>::store(total);
        } else {
            const std::int64_t slab = arguments.route.data != nullptr ? 0 : memory;
            const std::int64_t line =
                (slab * arguments.splits_of_grid + place.split) * arguments.batch + row;
            arguments.parts[line * arguments.d_out + column] = total;
        }
    }
}

// Block x: `splits_of_grid` neighbours share rows of W, so that the two blocks of a multiprocessor
// are likely to share columns, and with them x in the L1.
template <int type, bool aligned>
KERNEL void LAUNCH_BOUNDS(kMostThreads, 1) multiply_memories(Arguments arguments) {
    SharedMemory shared;
    const Shared<float> tiles = shared.take<float>(threads() / kWarpSize * kTile);
    const Shared<int> memory_of_row = shared.take<int>(kMostRows);
    const Shared<Kept> kept = shared.take<Kept>(1);
    if (thread() < arguments.batch) memory_of_row[thread()] = memory_of(arguments, thread());
    if (thread() == 0) {
        const int block = static_cast<int>(block_x());
        kept[0] = Kept{block % arguments.splits_of_grid,
                       block / arguments.splits_of_grid * arguments.row_groups * kRowsOfWarp};
    }
    barrier();
    for (int memory = 0; memory < arguments.memories_count; ++memory) {
        bool wanted = lane() < arguments.batch;
        if (wanted && arguments.route.data != nullptr) wanted = memory_of_row[lane()] == memory;
        // CUDA has a ballot of its own.
        const std::uint32_t rows = pyeditfast::device::ballot(wanted);
        if (rows == 0) continue;
        const Kept place = kept[0];
        const Share share = share_of(arguments, memory, rows, place);
        Sums<type, aligned> sums;
        sums.add(share);
        sums.store(tiles + warp() * kTile);
        barrier();
        write<type>(arguments, tiles, memory, rows, place);
        barrier();
    }
}

// Writes x, or act(gate) x, as rows that lie side by side.
KERNEL void LAUNCH_BOUNDS(kThreadsOfPack, 1)
    pack_tokens(Operand x, Operand gate, int activation, int type, std::int64_t d_in,
                std::int64_t pitch, void* packed) {
    const std::int64_t row = block_y(), k = block_x() * threads() + thread();
    if (k >= d_in) return;
    float value = load_element(x.data, row * x.row_stride + k * x.column_stride, type);
    if (gate.data != nullptr) {
        const float open =
            load_element(gate.data, row * gate.row_stride + k * gate.column_stride, type);
        value *= activate(open, activation);
    }
    store_element(packed, row * pitch + k, type, value);
}

Operand operand_of(const pyeditfast_matrix* matrix) {
    // Of a matrix without elements no address is formed.
    if (matrix == nullptr || matrix->data == nullptr) return {nullptr, 0, 0};
    return {matrix->data, matrix->row_stride, matrix->column_stride};
}

struct Multiply {
    const char* op;
    const char* sizes;
    const DecodeCut& cut;
    const Arguments& arguments;
    const pyeditfast_stream& stream;
    Message message;

    template <int type, bool aligned>
    int run() const {
        const int warps = kSlices * cut.splits_in_block * cut.row_groups;
        const std::size_t bytes =
            sizeof(float) * static_cast<std::size_t>(warps * kTile) + sizeof(int) * kMostRows + 16;
        return launch(op, sizes, multiply_memories<type, aligned>,
                      Grid{cut.blocks_of_rows * cut.splits_of_grid()}, warps * kWarpSize, bytes,
                      stream, message, arguments);
    }
    template <int type>
    int run() const {
        return cut.aligned ? run<type, true>() : run<type, false>();
    }
};

}  // namespace

namespace pyeditfast {

int multiply_tokens(const char* op, const pyeditfast_decode& decode,
                    Strided<const std::int64_t> route, void* output, void* workspace,
                    const pyeditfast_stream& stream, Message message, DecodeParts* parts) {
    const DecodeSizes sizes = decode_sizes(decode);
    const DecodeCut cut = cut_decode(decode, multiprocessors(stream));
    const int type = decode.main->type;
    Arguments arguments = {};
    arguments.x = operand_of(decode.x);
    arguments.memories[0] = operand_of(decode.main);
    for (int i = 0; i < decode.memories; ++i) {
        arguments.memories[i + 1] = operand_of(decode.sides + i);
    }
    arguments.bias = operand_of(decode.bias);
    arguments.route = route;
    arguments.d_out = static_cast<int>(decode.d_out);
    arguments.d_in = static_cast<int>(decode.d_in);
    arguments.chunk = static_cast<int>(cut.chunk);
    arguments.batch = static_cast<int>(decode.batch);
    arguments.memories_count = 1 + decode.memories;
    arguments.splits_of_grid = cut.splits_of_grid();
    arguments.splits_in_block = cut.splits_in_block;
    arguments.row_groups = cut.row_groups;
    const std::int64_t pitch = ceiling_of_division<std::int64_t>(decode.d_in, 8) * 8;
    const bool complete = route.data != nullptr && cut.splits_of_grid() == 1;
    if (complete) {
        arguments.output = output;
    } else {
        // Behind x, packed or not.
        arguments.parts = static_cast<float*>(workspace) + decode.batch * pitch;
    }
    *parts = {arguments.parts, cut.splits_of_grid()};
    if (cut.packed) {
        const Grid grid = {ceiling_of_division<std::int64_t>(decode.d_in, kThreadsOfPack),
                           decode.batch};
        const int status =
            launch(op, sizes.text, pack_tokens, grid, kThreadsOfPack, 0, stream, message,
                   arguments.x, operand_of(decode.gate), decode.gate_activation, type, decode.d_in,
                   pitch, workspace);
        if (status != kOk) return status;
        arguments.x = {workspace, pitch, 1};
    }
    const Multiply multiply = {op, sizes.text, cut, arguments, stream, message};
    if (type == kBFloat16) return multiply.run<kBFloat16>();
    if (type == kFloat16) return multiply.run<kFloat16>();
    return multiply.run<kFloat32>();
}

}  // namespace pyeditfast
