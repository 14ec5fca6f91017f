// Products of single tokens and memories on a CUDA device, for routed_linear.cu and
// activation_gap.cu: W_m x_b for rows x_b of up to 16 queries and memories W_m, the main memory
// (m = 0) and up to 8 sides.
#pragma once

#include <cstddef>
#include <cstdint>

#include "matrix.h"
#include "status.h"
#include "stream.h"

extern "C" {

// One token a query, `x` [batch, d_in], and memories [d_out, d_in], all of one element type and in
// the memory of one device. `gate`, like x, and `bias` [1, d_out] may be null; with a gate
// act(gate) x, computed in float32 and rounded once, stands in place of x. `gate_activation` is an
// Activation of activations.h. `splits`: into how many parts d_in is cut, 0 for as many as suit.
struct pyeditfast_decode {
    const pyeditfast_matrix* x;
    const pyeditfast_matrix* gate;
    const pyeditfast_matrix* main;
    const pyeditfast_matrix* sides;
    const pyeditfast_matrix* bias;
    int memories;  // How many sides there are.
    int gate_activation;
    int splits;
    std::int64_t batch;
    std::int64_t d_out;
    std::int64_t d_in;
};

}  // extern "C"

namespace pyeditfast {

constexpr int kMostRows = 16;
constexpr int kMostSides = 8;
constexpr int kMostSplits = 32;

// A split of d_in has a multiple of so many columns.
constexpr int kDecodeStep = 256;

// A vector of the caller's, in elements.
template <typename T>
struct Strided {
    T* data;
    std::int64_t stride;
};

// What a message says of a call.
struct DecodeSizes {
    char text[96];
};

// How the products are cut. Which numbers are added in which order depends on d_out, d_in, the
// layout of the memories and `splits` alone, so a row has the same bits in every batch and on every
// GPU.
struct DecodeCut {
    bool aligned;             // Rows of the memories can be loaded 16 bytes at a time.
    bool packed;              // x is first written into the workspace.
    int splits;               // Parts of d_in, `chunk` columns each.
    std::int64_t chunk;
    int splits_in_block;      // All of them, or 1.
    int row_groups;           // Of 32 rows of a memory, in a block.
    std::int64_t blocks_of_rows;

    int splits_of_grid() const { return splits / splits_in_block; }
};

// Parts of all products that stay to be added, split by split: [slabs, splits, batch, d_out], a
// slab for every memory, or one if each row has only its own memory. None where the output is
// already written.
struct DecodeParts {
    const float* data;
    int splits;
};

// Requires what the kernels take.
int check_decode(const pyeditfast_decode* decode, Message message);
int check_decode_workspace(const void* workspace, Message message);
int check_activation(const char* name, int activation, Message message);

DecodeSizes decode_sizes(const pyeditfast_decode& decode);

// `multiprocessors`: of the device, 0 where that is not known.
DecodeCut cut_decode(const pyeditfast_decode& decode, int multiprocessors);

// The bytes of workspace: of x, packed, and of the parts with a route or without one. 0 for what
// check_decode refuses.
std::int64_t decode_workspace(const pyeditfast_decode* decode, bool has_route);

// Queues the products: of each row and the memory of its route, 0 and up for a side, else the main
// memory; without a route of every row and every memory. `output` [batch, d_out], contiguous, is
// written, with the bias, where there is a route and nothing stays to be added.
int multiply_tokens(const char* op, const pyeditfast_decode& decode,
                    Strided<const std::int64_t> route, void* output, void* workspace,
                    const pyeditfast_stream& stream, Message message, DecodeParts* parts);

}  // namespace pyeditfast
