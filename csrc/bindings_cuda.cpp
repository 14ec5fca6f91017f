// The Python face of the .cu files. Addresses are those of device memory; `stream` is the number of
// the device and the address of the stream, on which work is queued.
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "activation_gap.h"
#include "bindings.h"
#include "cholesky_solve.h"
#include "decode_product.h"
#include "magnitude_threshold.h"
#include "routed_linear.h"
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

void cholesky_solve(std::uintptr_t gram, std::uintptr_t rhs, int element_bits, std::int64_t items,
                    std::int64_t n, std::int64_t columns, std::uintptr_t info,
                    std::uintptr_t workspace, const Stream& stream) {
    call([=](char* message, std::size_t message_size) {
        return pyeditfast_cuda_cholesky_solve(
            reinterpret_cast<void*>(gram), reinterpret_cast<void*>(rhs), element_bits, items, n,
            columns, reinterpret_cast<std::int32_t*>(info), reinterpret_cast<void*>(workspace),
            as_stream(stream), message, message_size);
    });
}

// Address and stride of a vector.
using Vector = std::pair<std::uintptr_t, std::int64_t>;

// The inputs of a decode, which hold their matrices.
class Decode {
public:
    Decode(const Matrix& x, const std::optional<Matrix>& gate, int gate_activation,
           const Matrix& main, const std::vector<Matrix>& sides, const std::optional<Matrix>& bias,
           std::int64_t batch, std::int64_t d_out, std::int64_t d_in, int splits)
        : x_(as_matrix(x)), main_(as_matrix(main)) {
        if (gate) gate_ = as_matrix(*gate);
        if (bias) bias_ = as_matrix(*bias);
        for (const Matrix& side : sides) sides_.push_back(as_matrix(side));
        arguments_ = {&x_,
                      gate ? &gate_ : nullptr,
                      &main_,
                      sides_.data(),
                      bias ? &bias_ : nullptr,
                      static_cast<int>(sides_.size()),
                      gate_activation,
                      splits,
                      batch,
                      d_out,
                      d_in};
    }
    Decode(const Decode&) = delete;
    Decode& operator=(const Decode&) = delete;

    const pyeditfast_decode* arguments() const { return &arguments_; }

private:
    pyeditfast_matrix x_, main_, gate_ = {}, bias_ = {};
    std::vector<pyeditfast_matrix> sides_;
    pyeditfast_decode arguments_;
};

void routed_linear_with_route(const Decode& decode, const Vector& route, std::uintptr_t output,
                              std::uintptr_t workspace, const Stream& stream) {
    call([&](char* message, std::size_t message_size) {
        return pyeditfast_cuda_routed_linear_with_route(
            decode.arguments(), reinterpret_cast<const std::int64_t*>(route.first), route.second,
            reinterpret_cast<void*>(output), reinterpret_cast<void*>(workspace),
            as_stream(stream), message, message_size);
    });
}

void routed_linear(const Decode& decode, int activation, const Vector& mask,
                   const Vector& thresholds, std::uintptr_t gaps, std::uintptr_t route,
                   std::uintptr_t output, std::uintptr_t workspace, const Stream& stream) {
    call([&](char* message, std::size_t message_size) {
        return pyeditfast_cuda_routed_linear(
            decode.arguments(), activation, reinterpret_cast<const bool*>(mask.first), mask.second,
            reinterpret_cast<const float*>(thresholds.first), thresholds.second,
            reinterpret_cast<float*>(gaps), reinterpret_cast<std::int64_t*>(route),
            reinterpret_cast<void*>(output), reinterpret_cast<void*>(workspace),
            as_stream(stream), message, message_size);
    });
}

void activation_gap(const Decode& decode, int activation, const Vector& mask, std::uintptr_t gaps,
                    std::uintptr_t workspace, const Stream& stream) {
    call([&](char* message, std::size_t message_size) {
        return pyeditfast_cuda_activation_gap(
            decode.arguments(), activation, reinterpret_cast<const bool*>(mask.first), mask.second,
            reinterpret_cast<float*>(gaps), reinterpret_cast<void*>(workspace), as_stream(stream),
            message, message_size);
    });
}

std::int64_t routed_linear_workspace(const Decode& decode, bool has_route) {
    return pyeditfast_cuda_routed_linear_workspace(decode.arguments(), has_route);
}

std::int64_t activation_gap_workspace(const Decode& decode) {
    return pyeditfast_cuda_activation_gap_workspace(decode.arguments());
}

void bind_decode(py::module_& module) {
    // Local: a test loads the module that emulates CUDA beside the other.
    py::class_<Decode>(module, "Decode", py::module_local())
        .def(py::init<const Matrix&, const std::optional<Matrix>&, int, const Matrix&,
                      const std::vector<Matrix>&, const std::optional<Matrix>&, std::int64_t,
                      std::int64_t, std::int64_t, int>(),
             py::kw_only(), py::arg("x"), py::arg("gate"), py::arg("gate_activation"),
             py::arg("main"), py::arg("sides"), py::arg("bias"), py::arg("batch"),
             py::arg("d_out"), py::arg("d_in"), py::arg("splits"));
    module.def("cuda_routed_linear_with_route", &routed_linear_with_route, py::arg("decode"),
               py::arg("route"), py::arg("output"), py::arg("workspace"), py::arg("stream"),
               "Writes every row's product with the memory of its route.");
    module.def("cuda_routed_linear", &routed_linear, py::arg("decode"), py::arg("activation"),
               py::arg("mask"), py::arg("thresholds"), py::arg("gaps"), py::arg("route"),
               py::arg("output"), py::arg("workspace"), py::arg("stream"),
               "Writes all gaps, the routes they choose, and every row's product with its memory; "
               "the mask's address may be 0.");
    module.def("cuda_routed_linear_workspace", &routed_linear_workspace, py::arg("decode"),
               py::arg("has_route"), "Returns the bytes of the workspace.");
    module.def("cuda_activation_gap", &activation_gap, py::arg("decode"), py::arg("activation"),
               py::arg("mask"), py::arg("gaps"), py::arg("workspace"), py::arg("stream"),
               "Writes all gaps; the mask's address may be 0.");
    module.def("cuda_activation_gap_workspace", &activation_gap_workspace, py::arg("decode"),
               "Returns the bytes of the workspace.");
}

}  // namespace

void bind_cuda(py::module_& module) {
    bind_decode(module);
    module.def("cuda_magnitude_threshold", &magnitude_threshold, py::arg("x"), py::arg("base"),
               py::arg("rows"), py::arg("columns"), py::arg("k"), py::arg("out"),
               py::arg("workspace"), py::arg("stream"),
               "Writes the k-th largest |x - base| at address out; base may be None.");
    module.def("cuda_magnitude_threshold_workspace",
               &pyeditfast_cuda_magnitude_threshold_workspace, py::arg("type"),
               py::arg("has_base"), "Returns the bytes of the workspace.");
    module.def("cuda_cholesky_solve", &cholesky_solve, py::arg("gram"), py::arg("rhs"),
               py::arg("element_bits"), py::arg("items"), py::arg("n"), py::arg("columns"),
               py::arg("info"), py::arg("workspace"), py::arg("stream"),
               "Writes the solutions over rhs and the first failing pivots, or 0, to info; uses up "
               "gram.");
    module.def("cuda_cholesky_solve_workspace", &pyeditfast_cuda_cholesky_solve_workspace,
               py::arg("element_bits"), py::arg("items"), py::arg("n"),
               "Returns the bytes of the workspace.");
}

}  // namespace bindings
}  // namespace pyeditfast
