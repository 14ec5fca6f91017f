// Calls every CUDA function of csrc, emulated on the CPU, on buffers of exactly the size that it may
// touch, and prints a line for each call. Built with sanitizers it finds accesses outside of them.
// With the argument "overrun" a buffer is one element too small, which a sanitizer has to notice.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "float_types.h"
#include "magnitude_threshold.h"
#include "matrix.h"
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

}  // namespace

int main(int count, char** arguments) {
    const bool overrun = count == 2 && std::strcmp(arguments[1], "overrun") == 0;
    magnitude_thresholds(overrun ? 1 : 0);
    return 0;
}
