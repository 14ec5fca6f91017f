// The Python face of the .cu files. Addresses are those of device memory; `stream` is the number of
// the device and the address of the stream, on which work is queued.
#include <pybind11/stl.h>

#include <optional>
#include <utility>

#include "bindings.h"
#include "magnitude_threshold.h"
#include "stream.h"

namespace pyeditfast {
namespace bindings {
namespace {

using Stream = std::pair<int, std::uintptr_t>;

pyeditfast_stream as_stream(const Stream& stream) {
    return {stream.first, reinterpret_cast<void*>(stream.second)};
}

void magnitude_threshold(const Matrix& x, const std::optional<Matrix>& base, std::int64_t rows,
                         std::int64_t columns, std::int64_t k, std::uintptr_t out,
                         std::uintptr_t workspace, const Stream& stream) {
    const pyeditfast_matrix values = as_matrix(x);
    const pyeditfast_matrix b = base ? as_matrix(*base) : pyeditfast_matrix{};
    const pyeditfast_matrix* subtracted = base ? &b : nullptr;
    call([&](char* message, std::size_t message_size) {
        return pyeditfast_cuda_magnitude_threshold(
            &values, subtracted, rows, columns, k, reinterpret_cast<float*>(out),
            reinterpret_cast<void*>(workspace), as_stream(stream), message, message_size);
    });
}

}  // namespace

void bind_cuda(py::module_& module) {
    module.def("cuda_magnitude_threshold", &magnitude_threshold, py::arg("x"), py::arg("base"),
               py::arg("rows"), py::arg("columns"), py::arg("k"), py::arg("out"),
               py::arg("workspace"), py::arg("stream"),
               "Writes the k-th largest |x - base| at address out; base may be None.");
    module.def("cuda_magnitude_threshold_workspace",
               &pyeditfast_cuda_magnitude_threshold_workspace, py::arg("type"),
               py::arg("has_base"), "Returns the bytes of the workspace.");
}

}  // namespace bindings
}  // namespace pyeditfast
