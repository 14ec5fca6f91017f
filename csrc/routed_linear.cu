// Decoding with side memories on a CUDA device: the products of decode_product.cu, then their sum
// and, where it is not given, the choice of the memory.
//
// Floor beside the products: the parts, 8 splits batch d_out bytes with a route, read and written
// in the L2 cache. What to expect on an H200, not measured: 3 us, most of it the launch.
#include "routed_linear.h"

#include "activation_gap.h"
#include "device.h"
#include "device_elements.h"

namespace {

using namespace pyeditfast::device;
using pyeditfast::decode_sizes;
using pyeditfast::DecodeParts;
using pyeditfast::fail;
using pyeditfast::kInvalidArgument;
using pyeditfast::kOk;
using pyeditfast::Message;
using pyeditfast::Strided;

constexpr int kThreads = 256;

// How rows are routed where no route is given.
struct Choice {
    const float* gaps;  // [batch, memories]
    Strided<const float> thresholds;
    std::int64_t* route;  // Written; null where a route is given.
    int memories;
};

// The side memory of a row, -1 for the main memory. NaN is above no threshold.
DEVICE inline int choose(const Choice& choice, std::int64_t row) {
    int best = -1;
    float largest = 0.0f;
    for (int memory = 0; memory < choice.memories; ++memory) {
        const float gap = choice.gaps[row * choice.memories + memory];
        if (gap > choice.thresholds.data[memory * choice.thresholds.stride] &&
            (best < 0 || gap > largest)) {
            best = memory;
            largest = gap;
        }
    }
    return best;
}

// Adds the parts of all splits, then the bias. Block y: a row.
KERNEL void LAUNCH_BOUNDS(kThreads, 1)
    add_splits(DecodeParts parts, Choice choice, const void* bias, std::int64_t bias_stride,
               int type, std::int64_t batch, std::int64_t d_out, void* output) {
    const std::int64_t row = block_y(), out = block_x() * threads() + thread();
    std::int64_t slab = 0;
    if (choice.route != nullptr) {
        const int chosen = choose(choice, row);
        if (out == 0) choice.route[row] = chosen;
        slab = chosen + 1;
    }
    if (out >= d_out) return;
    const float* part = parts.data + (slab * parts.splits * batch + row) * d_out + out;
    float total = 0.0f;
    for (int split = 0; split < parts.splits; ++split) total += part[split * batch * d_out];
    if (bias != nullptr) total += load_element(bias, out * bias_stride, type);
    store_element(output, row * d_out + out, type, total);
}

int add(const pyeditfast_decode& decode, const DecodeParts& parts, const Choice& choice,
        void* output, const pyeditfast_stream& stream, Message message) {
    const pyeditfast_matrix none = {};
    const pyeditfast_matrix& bias = decode.bias != nullptr ? *decode.bias : none;
    // A route is chosen even where there are no outputs.
    const std::int64_t outputs = decode.d_out > 0 ? decode.d_out : 1;
    const Grid grid = {ceiling_of_division<std::int64_t>(outputs, kThreads), decode.batch};
    return launch("routed_linear", decode_sizes(decode).text, add_splits, grid, kThreads, 0,
                  stream, message, parts, choice, static_cast<const void*>(bias.data),
                  bias.column_stride, decode.main->type, decode.batch, decode.d_out, output);
}

int check_output(const pyeditfast_decode& decode, const void* output, Message message) {
    if (output != nullptr || decode.batch * decode.d_out == 0) return kOk;
    return fail(kInvalidArgument, message, "output is a null pointer, but has %lld x %lld elements",
                static_cast<long long>(decode.batch), static_cast<long long>(decode.d_out));
}

}  // namespace

extern "C" std::int64_t pyeditfast_cuda_routed_linear_workspace(const pyeditfast_decode* decode,
                                                                bool has_route) {
    return pyeditfast::decode_workspace(decode, has_route);
}

extern "C" int pyeditfast_cuda_routed_linear_with_route(
    const pyeditfast_decode* decode, const std::int64_t* route, std::int64_t route_stride,
    void* output, void* workspace, pyeditfast_stream stream, char* message_text,
    std::size_t message_size) {
    const Message message = {message_text, message_size};
    int status = pyeditfast::check_decode(decode, message);
    if (status != kOk) return status;
    if (decode->batch == 0 || decode->d_out == 0) return kOk;
    if (route == nullptr) return fail(kInvalidArgument, message, "route is a null pointer");
    status = check_output(*decode, output, message);
    if (status == kOk) status = pyeditfast::check_decode_workspace(workspace, message);
    DecodeParts parts = {};
    if (status == kOk) {
        status = multiply_tokens("routed_linear", *decode, {route, route_stride}, output,
                                 workspace, stream, message, &parts);
    }
    if (status != kOk || parts.data == nullptr) return status;
    return add(*decode, parts, {}, output, stream, message);
}

extern "C" int pyeditfast_cuda_routed_linear(
    const pyeditfast_decode* decode, int activation, const bool* mask, std::int64_t mask_stride,
    const float* thresholds, std::int64_t thresholds_stride, float* gaps, std::int64_t* route,
    void* output, void* workspace, pyeditfast_stream stream, char* message_text,
    std::size_t message_size) {
    const Message message = {message_text, message_size};
    int status = pyeditfast::check_decode(decode, message);
    if (status == kOk) {
        status = pyeditfast::check_gap(*decode, activation, gaps, workspace, message);
    }
    if (status != kOk || decode->batch == 0) return status;
    status = check_output(*decode, output, message);
    if (status != kOk) return status;
    if (route == nullptr || thresholds == nullptr) {
        return fail(kInvalidArgument, message, "%s is a null pointer",
                    route == nullptr ? "route" : "thresholds");
    }
    DecodeParts parts = {};
    status = multiply_tokens("routed_linear", *decode, {nullptr, 0}, nullptr, workspace, stream,
                             message, &parts);
    if (status == kOk) {
        status = pyeditfast::gaps_of_parts("routed_linear", *decode, parts, activation,
                                           {mask, mask_stride}, gaps, stream, message);
    }
    if (status != kOk) return status;
    const Choice choice = {gaps, {thresholds, thresholds_stride}, route, decode->memories};
    return add(*decode, parts, choice, output, stream, message);
}
