// What a kernel's body and its launcher are written against, in place of CUDA itself.
//
// nvcc maps it to CUDA (device_cuda.h). A plain C++ compiler maps it to a block executor
// (tests/csrc/device_emulated.h) that runs the threads of a block as fibers on the CPU, checks every
// access to shared memory for its bounds and for races, and turns a barrier that not all threads
// reach into an error. So the same sources are proven on machines without a GPU.
//
//   KERNEL, DEVICE, HOST_AND_DEVICE  marks of a kernel, and of a function that kernels call
//   thread(), threads()           index in the block, and how many there are
//   lane(), warp()                thread() % 32 and thread() / 32
//   block_x(), block_y(), block_z()
//   barrier()                     all threads of the block; orders their shared memory
//   SharedMemory, Shared<T>       the block's dynamic shared memory, handed out array by array
//   shuffle_xor, ballot           among all 32 threads of a warp
//   multiply_16x8x16              the matrix unit, by a whole warp
//   load_16_bytes                 an aligned global load that does not stay in the L1 cache
//   load_16_bytes_if              the same where a condition holds, else zeros and no access
//   atomic_add, atomic_min        on integers in global or shared memory
//   launch                        starts a kernel, from the host
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include "device_cuda.h"
#else
#include "device_emulated.h"
#endif

namespace pyeditfast {
namespace device {

constexpr int kWarpSize = 32;

DEVICE inline int lane() { return thread() % kWarpSize; }
DEVICE inline int warp() { return thread() / kWarpSize; }

DEVICE inline float warp_sum(float value) {
    for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
        value += shuffle_xor(value, distance);
    }
    return value;
}

template <typename T>
HOST_AND_DEVICE constexpr T ceiling_of_division(T count, T size) {
    return (count + size - 1) / size;
}

}  // namespace device
}  // namespace pyeditfast
