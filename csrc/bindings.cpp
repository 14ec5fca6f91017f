// The Python face of csrc: addresses and sizes in, exceptions out. It knows no tensors, so one build
// serves every torch version.
#include "bindings.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "activation_gap.h"
#include "activations.h"
#include "apply_shift.h"
#include "edit_values.h"
#include "largest_magnitude.h"
#include "linear_cross_entropy.h"
#include "magnitude_threshold.h"
#include "masked_sgd.h"
#include "masked_sgd_product.h"
#include "philox.h"
#include "random_mask.h"
#include "team.h"
#include "ties_merge.h"

namespace py = pybind11;

namespace {

using pyeditfast::bindings::as_matrix;
using pyeditfast::bindings::call;
using pyeditfast::bindings::Matrix;

void random_uniform(std::uintptr_t out, std::int64_t numel, std::uint64_t seed, std::int64_t offset,
                    int threads) {
    call([=](char* message, std::size_t message_size) {
        return pyeditfast_random_uniform(reinterpret_cast<float*>(out), numel, seed, offset,
                                         threads, message, message_size);
    });
}

void random_mask(std::uintptr_t out, std::int64_t numel, std::uint64_t seed, double ratio,
                 std::int64_t offset, int threads) {
    call([=](char* message, std::size_t message_size) {
        return pyeditfast_random_mask(reinterpret_cast<std::uint8_t*>(out), numel, seed,
                                      static_cast<float>(ratio), offset, threads, message,
                                      message_size);
    });
}

void masked_sgd(const Matrix& weight, const Matrix& grad, const std::optional<Matrix>& main,
                std::int64_t rows, std::int64_t columns, std::uint64_t seed, double ratio,
                std::int64_t offset, double lr, double weight_decay, double norm_constraint,
                int threads) {
    const pyeditfast_matrix w = as_matrix(weight), g = as_matrix(grad);
    const pyeditfast_matrix m = main ? as_matrix(*main) : pyeditfast_matrix{};
    const pyeditfast_matrix* centre = main ? &m : nullptr;
    call([&](char* message, std::size_t message_size) {
        return pyeditfast_masked_sgd(&w, &g, centre, rows, columns, seed,
                                     static_cast<float>(ratio), offset, static_cast<float>(lr),
                                     static_cast<float>(weight_decay),
                                     static_cast<float>(norm_constraint), threads, message,
                                     message_size);
    });
}

void masked_sgd_product(const Matrix& weight, const Matrix& output_grads, const Matrix& inputs,
                        const std::optional<Matrix>& main, std::int64_t rows, std::int64_t columns,
                        std::int64_t tokens, std::uint64_t seed, double ratio, std::int64_t offset,
                        double lr, double weight_decay, double norm_constraint, int threads) {
    const pyeditfast_matrix w = as_matrix(weight), g = as_matrix(output_grads);
    const pyeditfast_matrix x = as_matrix(inputs);
    const pyeditfast_matrix m = main ? as_matrix(*main) : pyeditfast_matrix{};
    const pyeditfast_matrix* centre = main ? &m : nullptr;
    call([&](char* message, std::size_t message_size) {
        return pyeditfast_masked_sgd_product(
            &w, &g, &x, centre, rows, columns, tokens, seed, static_cast<float>(ratio), offset,
            static_cast<float>(lr), static_cast<float>(weight_decay),
            static_cast<float>(norm_constraint), threads, message, message_size);
    });
}

float magnitude_threshold(const Matrix& x, const std::optional<Matrix>& base, std::int64_t rows,
                          std::int64_t columns, std::int64_t k, int threads) {
    const pyeditfast_matrix values = as_matrix(x);
    const pyeditfast_matrix b = base ? as_matrix(*base) : pyeditfast_matrix{};
    const pyeditfast_matrix* subtracted = base ? &b : nullptr;
    float threshold = 0.0f;
    call([&](char* message, std::size_t message_size) {
        return pyeditfast_magnitude_threshold(&values, subtracted, rows, columns, k, &threshold,
                                              threads, message, message_size);
    });
    return threshold;
}

void ties_merge(const Matrix& out, const Matrix& main, const std::vector<Matrix>& sides,
                const std::vector<float>& thresholds, const std::vector<float>& weights,
                std::int64_t rows, std::int64_t columns, int threads) {
    if (thresholds.size() != sides.size() || weights.size() != sides.size()) {
        throw py::value_error("there are " + std::to_string(sides.size()) + " sides, but " +
                              std::to_string(thresholds.size()) + " thresholds and " +
                              std::to_string(weights.size()) + " weights");
    }
    const pyeditfast_matrix o = as_matrix(out), m = as_matrix(main);
    std::vector<pyeditfast_matrix> matrices;
    for (const Matrix& side : sides) matrices.push_back(as_matrix(side));
    call([&](char* message, std::size_t message_size) {
        return pyeditfast_ties_merge(&o, &m, matrices.data(), thresholds.data(), weights.data(),
                                     static_cast<std::int64_t>(sides.size()), rows, columns,
                                     threads, message, message_size);
    });
}

void edit_values(const Matrix& values, const Matrix& keys, const Matrix& grads, std::uintptr_t mean,
                 std::uintptr_t scale, std::int64_t rows, std::int64_t d_in, std::int64_t d_out,
                 double lr, int threads) {
    const pyeditfast_matrix v = as_matrix(values), k = as_matrix(keys), g = as_matrix(grads);
    call([&](char* message, std::size_t message_size) {
        return pyeditfast_edit_values(&v, &k, &g, reinterpret_cast<const float*>(mean),
                                      reinterpret_cast<const float*>(scale), rows, d_in, d_out,
                                      static_cast<float>(lr), threads, message, message_size);
    });
}

void activation_gap(const Matrix& main, const Matrix& side, std::int64_t tokens,
                    std::int64_t d_out, int activation, std::uintptr_t gaps, int threads) {
    const pyeditfast_matrix m = as_matrix(main), s = as_matrix(side);
    call([&](char* message, std::size_t message_size) {
        return pyeditfast_activation_gap(&m, &s, tokens, d_out, activation,
                                         reinterpret_cast<float*>(gaps), threads, message,
                                         message_size);
    });
}

void apply_shift(const Matrix& weight, const Matrix& shift, const std::optional<Matrix>& remainder,
                 std::int64_t rows, std::int64_t columns, int rounding, std::uint64_t seed,
                 std::int64_t offset, int threads) {
    const pyeditfast_matrix w = as_matrix(weight), s = as_matrix(shift);
    const pyeditfast_matrix r = remainder ? as_matrix(*remainder) : pyeditfast_matrix{};
    const pyeditfast_matrix* lost = remainder ? &r : nullptr;
    call([&](char* message, std::size_t message_size) {
        return pyeditfast_apply_shift(&w, &s, lost, rows, columns, rounding, seed, offset, threads,
                                      message, message_size);
    });
}

float largest_magnitude(const Matrix& x, std::int64_t rows, std::int64_t columns, int threads) {
    const pyeditfast_matrix values = as_matrix(x);
    float largest = 0.0f;
    call([&](char* message, std::size_t message_size) {
        return pyeditfast_largest_magnitude(&values, rows, columns, &largest, threads, message,
                                            message_size);
    });
    return largest;
}

void linear_cross_entropy(const Matrix& hidden, const Matrix& weight, std::uintptr_t bias,
                          std::uintptr_t targets, std::int64_t rows, std::int64_t width,
                          std::int64_t vocabulary, std::uintptr_t losses, std::uintptr_t grads,
                          int threads) {
    const pyeditfast_matrix h = as_matrix(hidden), w = as_matrix(weight);
    call([&](char* message, std::size_t message_size) {
        return pyeditfast_linear_cross_entropy(
            &h, &w, reinterpret_cast<const float*>(bias),
            reinterpret_cast<const std::int64_t*>(targets), rows, width, vocabulary,
            reinterpret_cast<float*>(losses), reinterpret_cast<float*>(grads), threads, message,
            message_size);
    });
}

py::tuple philox_4x32_10(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3,
                         std::uint32_t k0, std::uint32_t k1) {
    const pyeditfast::PhiloxState out = pyeditfast::philox_4x32_10({c0, c1, c2, c3}, k0, k1);
    return py::make_tuple(out.c0, out.c1, out.c2, out.c3);
}

py::dict build_info() {
    py::dict info;
    info["version"] = PYEDITFAST_VERSION;
    info["compiler"] = PYEDITFAST_COMPILER;
    info["build_type"] = PYEDITFAST_BUILD_TYPE;
#ifdef PYEDITFAST_CUDA_VERSION
    info["cuda"] = true;
    info["cuda_version"] = PYEDITFAST_CUDA_VERSION;
    info["cuda_architectures"] = PYEDITFAST_CUDA_ARCHITECTURES;
#else
    info["cuda"] = false;
    info["cuda_version"] = py::none();
    info["cuda_architectures"] = py::none();
#endif
    info["cuda_note"] = PYEDITFAST_CUDA_NOTE;
#ifdef PYEDITFAST_EMULATED_CUDA
    info["cuda_emulated"] = true;
#else
    info["cuda_emulated"] = false;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_csrc, module) {
    module.doc() = "Compiled functions of pyeditfast. They take addresses: call them through pyeditfast.ops.";

    module.def("build_info", &build_info,
               "Compiler and CUDA of this build, as a dictionary.");
    module.def(
        "share_threads",
        [](std::uintptr_t start) {
            pyeditfast::share_threads(reinterpret_cast<pyeditfast::StartTeam>(start));
        },
        py::arg("start"),
        "Runs on the threads of the OpenMP runtime whose GOMP_parallel is at the address, 0: on new "
        "ones.");
    module.def("philox_4x32_10", &philox_4x32_10, py::arg("c0"), py::arg("c1"), py::arg("c2"),
               py::arg("c3"), py::arg("k0"), py::arg("k1"),
               "One Philox4x32-10 block, for tests.");
    module.def("random_uniform", &random_uniform, py::arg("out"), py::arg("numel"), py::arg("seed"),
               py::arg("offset"), py::arg("threads"),
               "Writes numel float32 numbers in [0, 1) at address out.");
    module.def("random_mask", &random_mask, py::arg("out"), py::arg("numel"), py::arg("seed"),
               py::arg("ratio"), py::arg("offset"), py::arg("threads"),
               "Writes numel bytes, 1 where uniform < ratio and 0 elsewhere, at address out.");

    // A matrix is (address, row stride, column stride, element type), see csrc/matrix.h.
    module.attr("FLOAT32") = static_cast<int>(pyeditfast::kFloat32);
    module.attr("BFLOAT16") = static_cast<int>(pyeditfast::kBFloat16);
    module.attr("FLOAT16") = static_cast<int>(pyeditfast::kFloat16);
    module.def("masked_sgd", &masked_sgd, py::arg("weight"), py::arg("grad"), py::arg("main"),
               py::arg("rows"), py::arg("columns"), py::arg("seed"), py::arg("ratio"),
               py::arg("offset"), py::arg("lr"), py::arg("weight_decay"),
               py::arg("norm_constraint"), py::arg("threads"),
               "Takes a masked step on the matrix weight, clamped around main unless it is None.");
    module.def("masked_sgd_product", &masked_sgd_product, py::arg("weight"),
               py::arg("output_grads"), py::arg("inputs"), py::arg("main"), py::arg("rows"),
               py::arg("columns"), py::arg("tokens"), py::arg("seed"), py::arg("ratio"),
               py::arg("offset"), py::arg("lr"), py::arg("weight_decay"),
               py::arg("norm_constraint"), py::arg("threads"),
               "The same for the gradient output_grads inputs^T, of which it computes the mask's "
               "part.");
    module.def("masked_sgd_product_is_fast", &pyeditfast_masked_sgd_product_is_fast,
               "Whether masked_sgd_product has vector instructions to run on.");
    module.def("magnitude_threshold", &magnitude_threshold, py::arg("x"), py::arg("base"),
               py::arg("rows"), py::arg("columns"), py::arg("k"), py::arg("threads"),
               "Returns the k-th largest |x - base|; base may be None.");
    module.def("ties_merge", &ties_merge, py::arg("out"), py::arg("main"), py::arg("sides"),
               py::arg("thresholds"), py::arg("weights"), py::arg("rows"), py::arg("columns"),
               py::arg("threads"), "Writes the merged side memory to the matrix out.");
    module.def("edit_values", &edit_values, py::arg("values"), py::arg("keys"), py::arg("grads"),
               py::arg("mean"), py::arg("scale"), py::arg("rows"), py::arg("d_in"),
               py::arg("d_out"), py::arg("lr"), py::arg("threads"),
               "Writes -lr ||key^||^2 grad^ to the matrix values.");
    module.attr("ACTIVATIONS") = py::dict(
        py::arg("none") = static_cast<int>(pyeditfast::kNoActivation),
        py::arg("relu") = static_cast<int>(pyeditfast::kRelu),
        py::arg("silu") = static_cast<int>(pyeditfast::kSilu),
        py::arg("gelu") = static_cast<int>(pyeditfast::kGelu),
        py::arg("gelu_tanh") = static_cast<int>(pyeditfast::kGeluTanh));
    module.def("activation_gap", &activation_gap, py::arg("main"), py::arg("side"),
               py::arg("tokens"), py::arg("d_out"), py::arg("activation"), py::arg("gaps"),
               py::arg("threads"), "Writes the gaps of tokens, float32, at address gaps.");
    module.attr("ROUNDINGS") = py::dict(py::arg("nearest") = 0, py::arg("stochastic") = 1,
                                        py::arg("compensated") = 2);
    module.def("apply_shift", &apply_shift, py::arg("weight"), py::arg("shift"),
               py::arg("remainder"), py::arg("rows"), py::arg("columns"), py::arg("rounding"),
               py::arg("seed"), py::arg("offset"), py::arg("threads"),
               "Adds a dense shift to the matrix weight, rounded once.");
    module.def("largest_magnitude", &largest_magnitude, py::arg("x"), py::arg("rows"),
               py::arg("columns"), py::arg("threads"), "Returns the largest |x|, 0 of nothing.");
    module.def("linear_cross_entropy", &linear_cross_entropy, py::arg("hidden"), py::arg("weight"),
               py::arg("bias"), py::arg("targets"), py::arg("rows"), py::arg("width"),
               py::arg("vocabulary"), py::arg("losses"), py::arg("grads"), py::arg("threads"),
               "Writes a head's losses, and their gradients by hidden, float32, at addresses.");
    module.def("linear_cross_entropy_is_fast", &pyeditfast_linear_cross_entropy_is_fast,
               "Whether linear_cross_entropy has vector instructions to run on.");

#if defined(PYEDITFAST_CUDA_VERSION) || defined(PYEDITFAST_EMULATED_CUDA)
    pyeditfast::bindings::bind_cuda(module);
#endif
}
