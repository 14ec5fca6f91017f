// What the Python faces of csrc share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <tuple>

#include "matrix.h"
#include "status.h"

namespace pyeditfast {
namespace bindings {

namespace py = pybind11;

constexpr std::size_t kMessageSize = 256;

// Calls a function of csrc without the interpreter's lock and raises what it reports.
template <typename Function>
void call(const Function& function) {
    char message[kMessageSize] = "";
    int status;
    {
        py::gil_scoped_release unlocked;
        status = function(message, kMessageSize);
    }
    if (status == kOk) return;
    if (status == kInvalidArgument) throw py::value_error(message);
    throw std::runtime_error(message);
}

// Address, row stride, column stride, element type.
using Matrix = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, int>;

inline pyeditfast_matrix as_matrix(const Matrix& matrix) {
    const auto [address, row_stride, column_stride, type] = matrix;
    return {reinterpret_cast<void*>(address), row_stride, column_stride, type};
}

// Adds the functions of the .cu files to the module.
void bind_cuda(py::module_& module);

}  // namespace bindings
}  // namespace pyeditfast
