// Calls every CUDA function of csrc, emulated on the CPU, on buffers of exactly the size that it may
// touch, and prints a line for each call. Built with sanitizers it finds accesses outside of them.
// With the argument "overrun" or "overrun_decode" a buffer is one element too small, which a
// sanitizer has to notice.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "activation_gap.h"
#include "cholesky_solve.h"
#include "decode_product.h"
#include "float_types.h"
#include "magnitude_threshold.h"
#include "matrix.h"
#include "routed_linear.h"
#include "status.h"
#include "stream.h"

namespace {

using pyeditfast::kBFloat16;
using pyeditfast::kFloat16;
using pyeditfast::kFloat32;

const int kTypes[] = {kFloat32, kBFloat16, kFloat16};
const pyeditfast_stream kStream = {0, nullptr};

char message[300];

void require(int status, const std::string& call) {
    if (status != pyeditfast::kOk) {
        std::fprintf(stderr, "%s: %s\n", call.c_str(), message);
        std::exit(1);
    }
    std::printf("%s\n", call.c_str());
}

// Memory of exactly `bytes` bytes at a multiple of 16, all of its values small numbers.
class Buffer {
public:
    explicit Buffer(std::int64_t bytes)
        : bytes_(static_cast<unsigned char*>(std::malloc(static_cast<std::size_t>(bytes)))) {
        for (std::int64_t i = 0; i < bytes; ++i) {
            // 0x3C in the upper byte of a number of any type is a number between 0.001 and 4.
            bytes_.get()[i] = i % 2 == 1 ? 0x3C : static_cast<unsigned char>(i * 37);
        }
    }
    template <typename T = void>
    T* at(std::int64_t offset = 0) const {
        return reinterpret_cast<T*>(bytes_.get() + offset);
    }

private:
    struct Free {
        void operator()(unsigned char* bytes) const { std::free(bytes); }
    };
    std::unique_ptr<unsigned char, Free> bytes_;
};

struct Size {
    std::int64_t rows, columns;
};

void magnitude_thresholds(std::int64_t missing) {
    for (const int type : kTypes) {
        for (const bool has_base : {false, true}) {
            for (const Size size : {Size{1, 1}, Size{3, 5}, Size{33, 65}, Size{60, 1001}}) {
                for (const std::int64_t padding : {0, 3}) {
                    const std::int64_t stride = size.columns + padding;
                    const std::int64_t count = (size.rows - 1) * stride + size.columns - missing;
                    const std::int64_t bytes = count * pyeditfast::element_size(type);
                    const Buffer x(bytes), base(bytes), out(sizeof(float));
                    const Buffer workspace(
                        pyeditfast_cuda_magnitude_threshold_workspace(type, has_base));
                    const pyeditfast_matrix values = {x.at(), stride, 1, type};
                    const pyeditfast_matrix subtracted = {base.at(), stride, 1, type};
                    require(pyeditfast_cuda_magnitude_threshold(
                                &values, has_base ? &subtracted : nullptr, size.rows, size.columns,
                                (size.rows * size.columns + 1) / 2, out.at<float>(),
                                workspace.at(), kStream, message, sizeof message),
                            "magnitude_threshold");
                }
            }
        }
    }
}

template <typename T>
void cholesky_solves() {
    constexpr int kBits = 8 * sizeof(T);
    const std::int64_t sizes[][3] = {
        {1, 1, 1}, {3, 5, 130}, {1, 64, 16}, {2, 67, 17}, {1, 130, 70}};
    for (const auto& [items, n, columns] : sizes) {
        for (const bool solvable : {true, false}) {
            const Buffer gram(items * n * n * static_cast<std::int64_t>(sizeof(T)));
            const Buffer rhs(items * n * columns * static_cast<std::int64_t>(sizeof(T)));
            const Buffer info(items * static_cast<std::int64_t>(sizeof(std::int32_t)));
            const Buffer workspace(pyeditfast_cuda_cholesky_solve_workspace(kBits, items, n));
            for (std::int64_t i = 0; i < items * n; ++i) {
                const bool fails = !solvable && i % n == n / 2;
                gram.at<T>()[i * n + i % n] = static_cast<T>(fails ? -1 : 4 * n);
            }
            require(pyeditfast_cuda_cholesky_solve(gram.at(), rhs.at(), kBits, items, n, columns,
                                                   info.at<std::int32_t>(), workspace.at(),
                                                   kStream, message, sizeof message),
                    "cholesky_solve");
            for (std::int64_t i = 0; i < items; ++i) {
                if (info.at<std::int32_t>()[i] == (solvable ? 0 : n / 2 + 1)) continue;
                std::fprintf(stderr, "pivot %d\n", info.at<std::int32_t>()[i]);
                std::exit(1);
            }
        }
    }
}

// A matrix of exactly its elements, whose rows lie `padding` elements apart, or whose columns do.
struct Numbers {
    Numbers(int type, Size size, std::int64_t padding, bool transposed, std::int64_t missing = 0)
        : stride((transposed ? size.rows : size.columns) + padding),
          bytes(count_of(size, transposed, missing) * pyeditfast::element_size(type)),
          matrix{bytes.at(), transposed ? 1 : stride, transposed ? stride : 1, type} {}

    std::int64_t count_of(Size size, bool transposed, std::int64_t missing) const {
        const std::int64_t lines = transposed ? size.columns : size.rows;
        const std::int64_t length = transposed ? size.rows : size.columns;
        return (lines - 1) * stride + length - missing;
    }

    std::int64_t stride;
    Buffer bytes;
    pyeditfast_matrix matrix;
};

struct DecodeCase {
    int type, memories, splits;
    std::int64_t batch, d_out, d_in, padding;
    bool transposed, gated;
};

void decode(const DecodeCase& one, std::int64_t missing) {
    const Size tokens = {one.batch, one.d_in}, weights = {one.d_out, one.d_in};
    const Numbers x(one.type, tokens, one.padding, false), gate(one.type, tokens, 1, false);
    const Numbers main(one.type, weights, one.padding, one.transposed, missing);
    const Numbers bias(one.type, {1, one.d_out}, 0, false);
    std::vector<std::unique_ptr<Numbers>> numbers;
    std::vector<pyeditfast_matrix> sides;
    for (int i = 0; i < one.memories; ++i) {
        numbers.emplace_back(new Numbers(one.type, weights, one.padding, one.transposed));
        sides.push_back(numbers.back()->matrix);
    }
    const pyeditfast_decode call = {&x.matrix,
                                    one.gated ? &gate.matrix : nullptr,
                                    &main.matrix,
                                    sides.data(),
                                    &bias.matrix,
                                    one.memories,
                                    one.gated ? 2 : 0,
                                    one.splits,
                                    one.batch,
                                    one.d_out,
                                    one.d_in};
    const Buffer output(one.batch * one.d_out * pyeditfast::element_size(one.type));
    const Buffer gaps(one.batch * one.memories * static_cast<std::int64_t>(sizeof(float)));
    const Buffer route(one.batch * static_cast<std::int64_t>(sizeof(std::int64_t)));
    const Buffer mask(one.batch), thresholds(one.memories * 4);
    for (std::int64_t row = 0; row < one.batch; ++row) {
        route.at<std::int64_t>()[row] = row * 5 % (one.memories + 1) - 1;
        mask.at<bool>()[row] = row % 3 != 1;
    }
    const Buffer parts(pyeditfast_cuda_routed_linear_workspace(&call, true));
    require(pyeditfast_cuda_routed_linear_with_route(&call, route.at<std::int64_t>(), 1,
                                                     output.at(), parts.at(), kStream, message,
                                                     sizeof message),
            "routed_linear_with_route");
    const Buffer workspace(pyeditfast_cuda_routed_linear_workspace(&call, false));
    require(pyeditfast_cuda_routed_linear(&call, 3, mask.at<bool>(), 1, thresholds.at<float>(), 1,
                                          gaps.at<float>(), route.at<std::int64_t>(), output.at(),
                                          workspace.at(), kStream, message, sizeof message),
            "routed_linear");
    const Buffer room(pyeditfast_cuda_activation_gap_workspace(&call));
    require(pyeditfast_cuda_activation_gap(&call, 4, mask.at<bool>(), 1, gaps.at<float>(),
                                           room.at(), kStream, message, sizeof message),
            "activation_gap");
}

void decodes(std::int64_t missing) {
    for (const int type : kTypes) {
        for (const bool gated : {false, true}) {
            decode({type, 2, 0, 16, 33, 40, 0, false, gated}, missing);
            decode({type, 1, 0, 3, 70, 1048, 8, false, gated}, 0);
            decode({type, 8, 3, 10, 65, 520, 0, false, gated}, 0);
            decode({type, 2, 2, 5, 31, 300, 0, true, gated}, 0);
            decode({type, 1, 0, 1, 5, 37, 3, false, gated}, 0);
        }
    }
}

}  // namespace

int main(int count, char** arguments) {
    const bool overrun = count == 2 && std::strcmp(arguments[1], "overrun") == 0;
    const bool overrun_decode = count == 2 && std::strcmp(arguments[1], "overrun_decode") == 0;
    magnitude_thresholds(overrun ? 1 : 0);
    decodes(overrun_decode ? 1 : 0);
    cholesky_solves<float>();
    cholesky_solves<double>();
    return 0;
}
