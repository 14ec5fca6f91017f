// The Python face of csrc: addresses and sizes in, exceptions out. It knows no tensors, so one build
// serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "philox.h"
#include "random_mask.h"
#include "status.h"

namespace py = pybind11;

namespace {

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
    if (status == pyeditfast::kOk) return;
    if (status == pyeditfast::kInvalidArgument) throw py::value_error(message);
    throw std::runtime_error(message);
}

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
#ifdef _OPENMP
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
    return info;
}

}  // namespace

PYBIND11_MODULE(_csrc, module) {
    module.doc() = "Compiled functions of pyeditfast. They take addresses: call them through pyeditfast.ops.";

    module.def("build_info", &build_info,
               "Compiler, CUDA and OpenMP of this build, as a dictionary.");
    module.def("philox_4x32_10", &philox_4x32_10, py::arg("c0"), py::arg("c1"), py::arg("c2"),
               py::arg("c3"), py::arg("k0"), py::arg("k1"),
               "One Philox4x32-10 block, for tests.");
    module.def("random_uniform", &random_uniform, py::arg("out"), py::arg("numel"), py::arg("seed"),
               py::arg("offset"), py::arg("threads"),
               "Writes numel float32 numbers in [0, 1) at address out.");
    module.def("random_mask", &random_mask, py::arg("out"), py::arg("numel"), py::arg("seed"),
               py::arg("ratio"), py::arg("offset"), py::arg("threads"),
               "Writes numel bytes, 1 where uniform < ratio and 0 elsewhere, at address out.");
}
