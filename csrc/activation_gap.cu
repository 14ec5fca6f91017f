// Activation gaps of single tokens on a CUDA device, from the products of decode_product.cu.
//
// Floor beside the products: the parts, 8 (1 + memories) splits batch d_out bytes, read and written
// in the L2 cache; of the main memory they are read for every side. What to expect on an H200, not
// measured: 4 us for 2 memories of 4096 outputs, next to 73 for the products in bf16.
#include "activation_gap.h"

#include <cmath>

#include "device.h"
#include "device_activations.h"
#include "device_elements.h"

namespace {

using namespace pyeditfast::device;
using pyeditfast::DecodeParts;
using pyeditfast::fail;
using pyeditfast::kInvalidArgument;
using pyeditfast::kOk;
using pyeditfast::Message;
using pyeditfast::Strided;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;

DEVICE inline float add_splits(const float* part, int splits, std::int64_t stride) {
    float total = 0.0f;
    for (int split = 0; split < splits; ++split) total += part[split * stride];
    return total;
}

// Block x: a side memory; block y: a row.
KERNEL void LAUNCH_BOUNDS(kThreads, 1)
    gaps_of_outputs(DecodeParts parts, const void* bias, std::int64_t bias_stride, int type,
                    int activation, Strided<const bool> mask, std::int64_t batch,
                    std::int64_t d_out, float* gaps) {
    SharedMemory shared;
    const Shared<float> of_warps = shared.take<float>(kWarps);
    const std::int64_t memory = block_x(), row = block_y(), stride = batch * d_out;
    const float* const main = parts.data + row * d_out;
    const float* const side = main + (memory + 1) * parts.splits * stride;
    float squares = 0.0f;
    for (std::int64_t out = thread(); out < d_out; out += threads()) {
        float from = add_splits(main + out, parts.splits, stride);
        float to = add_splits(side + out, parts.splits, stride);
        if (bias != nullptr) {
            const float offset = load_element(bias, out * bias_stride, type);
            from += offset;
            to += offset;
        }
        const float difference = activate(to, activation) - activate(from, activation);
        squares += difference * difference;
    }
    squares = warp_sum(squares);
    if (lane() == 0) of_warps[warp()] = squares;
    barrier();
    if (thread() != 0) return;
    float total = 0.0f;
    for (int i = 0; i < kWarps; ++i) {
        const float one = of_warps[i];
        total += one;
    }
    const bool counts = mask.data == nullptr || mask.data[row * mask.stride];
    gaps[row * blocks_x() + memory] = counts ? sqrtf(total) : 0.0f;
}

}  // namespace

namespace pyeditfast {

int check_gap(const pyeditfast_decode& decode, int activation, const float* gaps,
              const void* workspace, Message message) {
    const int status = check_activation("activation", activation, message);
    if (status != kOk || decode.batch == 0) return status;
    if (gaps == nullptr && decode.memories > 0) {
        return fail(kInvalidArgument, message, "gaps is a null pointer, but has %lld x %d elements",
                    static_cast<long long>(decode.batch), decode.memories);
    }
    return check_decode_workspace(workspace, message);
}

int gaps_of_parts(const char* op, const pyeditfast_decode& decode, const DecodeParts& parts,
                  int activation, Strided<const bool> mask, float* gaps,
                  const pyeditfast_stream& stream, Message message) {
    const pyeditfast_matrix none = {};
    const pyeditfast_matrix& bias = decode.bias != nullptr ? *decode.bias : none;
    return launch(op, decode_sizes(decode).text, gaps_of_outputs,
                  Grid{decode.memories, decode.batch}, kThreads, kWarps * sizeof(float), stream,
                  message, parts, static_cast<const void*>(bias.data), bias.column_stride,
                  decode.main->type, activation, mask, decode.batch, decode.d_out, gaps);
}

}  // namespace pyeditfast

extern "C" std::int64_t pyeditfast_cuda_activation_gap_workspace(
    const pyeditfast_decode* decode) {
    return pyeditfast::decode_workspace(decode, false);
}

extern "C" int pyeditfast_cuda_activation_gap(const pyeditfast_decode* decode, int activation,
                                              const bool* mask, std::int64_t mask_stride,
                                              float* gaps, void* workspace,
                                              pyeditfast_stream stream, char* message_text,
                                              std::size_t message_size) {
    const Message message = {message_text, message_size};
    int status = pyeditfast::check_decode(decode, message);
    if (status == kOk) {
        status = pyeditfast::check_gap(*decode, activation, gaps, workspace, message);
    }
    if (status != kOk || decode->batch == 0 || decode->memories == 0) return status;
    DecodeParts parts = {};
    status = multiply_tokens("activation_gap", *decode, {nullptr, 0}, nullptr, workspace, stream,
                             message, &parts);
    if (status != kOk) return status;
    return pyeditfast::gaps_of_parts("activation_gap", *decode, parts, activation,
                                     {mask, mask_stride}, gaps, stream, message);
}
