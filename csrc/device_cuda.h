// device.h in CUDA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "matrix.h"
#include "status.h"
#include "stream.h"

#define KERNEL __global__
#define DEVICE __device__
#define HOST_AND_DEVICE __host__ __device__
// How many threads a block of the kernel has at most, and how many such blocks shall fit.
#define LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")

namespace pyeditfast {
namespace device {

DEVICE inline int thread() { return static_cast<int>(threadIdx.x); }
DEVICE inline int threads() { return static_cast<int>(blockDim.x); }
DEVICE inline std::int64_t block_x() { return blockIdx.x; }
DEVICE inline std::int64_t block_y() { return blockIdx.y; }
DEVICE inline std::int64_t block_z() { return blockIdx.z; }
DEVICE inline std::int64_t blocks_x() { return gridDim.x; }

DEVICE inline void barrier() { __syncthreads(); }

template <typename T>
using Shared = T*;

extern __shared__ __align__(16) unsigned char pyeditfast_shared_memory[];

class SharedMemory {
public:
    // Returns the next `count` elements, which no other array shares, at a multiple of 16 bytes.
    template <typename T>
    DEVICE Shared<T> take(int count) {
        T* taken = reinterpret_cast<T*>(pyeditfast_shared_memory + used_);
        used_ += (count * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
        return taken;
    }

private:
    int used_ = 0;
};

template <typename T>
DEVICE inline T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

DEVICE inline std::uint32_t ballot(bool predicate) {
    return __ballot_sync(0xFFFFFFFFu, predicate);
}

DEVICE inline int count_bits(std::uint32_t bits) { return __popc(bits); }

DEVICE inline std::uint32_t atomic_add(std::uint32_t* place, std::uint32_t value) {
    return atomicAdd(place, value);
}

DEVICE inline std::uint64_t atomic_add(std::uint64_t* place, std::uint64_t value) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(place),
                     static_cast<unsigned long long>(value));
}

DEVICE inline std::uint32_t atomic_add(Shared<std::uint32_t> array, int index,
                                       std::uint32_t value) {
    return atomicAdd(array + index, value);
}

// Sixteen bytes as four words.
struct alignas(16) Words {
    std::uint32_t at[4];
};

DEVICE inline Words load_16_bytes(const void* place) {
    Words words;
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
        : "l"(place));
    return words;
}

// The same for what other warps of the block read too.
DEVICE inline Words load_16_bytes_to_keep(const void* place) {
    Words words;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
        : "l"(place));
    return words;
}

// A predicated instruction, so that no branch stands between the loads of a loop.
#define PYEDITFAST_LOAD_16_BYTES_IF(load)                                                        \
    asm("{\n\t"                                                                                  \
        ".reg .pred wanted;\n\t"                                                                 \
        "setp.ne.s32 wanted, %5, 0;\n\t"                                                         \
        "mov.b32 %0, 0;\n\t"                                                                     \
        "mov.b32 %1, 0;\n\t"                                                                     \
        "mov.b32 %2, 0;\n\t"                                                                     \
        "mov.b32 %3, 0;\n\t"                                                                     \
        "@wanted " load " {%0, %1, %2, %3}, [%4];\n\t"                                           \
        "}"                                                                                      \
        : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])             \
        : "l"(place), "r"(static_cast<int>(condition)))

DEVICE inline Words load_16_bytes_if(bool condition, const void* place) {
    Words words;
    PYEDITFAST_LOAD_16_BYTES_IF("ld.global.nc.L1::no_allocate.L2::128B.v4.u32");
    return words;
}

DEVICE inline Words load_16_bytes_to_keep_if(bool condition, const void* place) {
    Words words;
    PYEDITFAST_LOAD_16_BYTES_IF("ld.global.nc.v4.u32");
    return words;
}

#undef PYEDITFAST_LOAD_16_BYTES_IF

DEVICE inline float float_of(std::uint32_t bits) { return __uint_as_float(bits); }
DEVICE inline std::uint32_t bits_of(float value) { return __float_as_uint(value); }

// The element types of matrix.h: how they are stored, and as float32.
template <int type>
struct Element;

template <>
struct Element<kFloat32> {
    using Stored = float;
    DEVICE static float load(float stored) { return stored; }
    DEVICE static float store(float value) { return value; }
};

template <>
struct Element<kBFloat16> {
    using Stored = std::uint16_t;
    DEVICE static float load(std::uint16_t stored) {
        return float_of(static_cast<std::uint32_t>(stored) << 16);
    }
    DEVICE static std::uint16_t store(float value) {
        return __bfloat16_as_ushort(__float2bfloat16_rn(value));
    }
};

template <>
struct Element<kFloat16> {
    using Stored = std::uint16_t;
    DEVICE static float load(std::uint16_t stored) {
        return __half2float(__ushort_as_half(stored));
    }
    DEVICE static std::uint16_t store(float value) {
        return __half_as_ushort(__float2half_rn(value));
    }
};

// sums += a b for a 16 x 16 and b 16 x 8, each spread over a warp as PTX lays out mma.m16n8k16:
// with g = lane / 4 and t = lane % 4, a holds (g, 2t..), (g + 8, 2t..), (g, 2t + 8..) and
// (g + 8, 2t + 8..), two elements a word; b holds (2t.., g) and (2t + 8.., g); sums hold (g, 2t),
// (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <int type>
DEVICE inline void multiply_16x8x16(float (&sums)[4], const std::uint32_t (&a)[4],
                                    const std::uint32_t (&b)[2]) {
    if constexpr (type == kBFloat16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        static_assert(type == kFloat16, "the matrix unit takes 16-bit elements");
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

struct Grid {
    std::int64_t x = 1;
    std::int64_t y = 1;
    std::int64_t z = 1;
};

// Makes the stream's device the current one, and the one before it again at the end.
class CurrentDevice {
public:
    explicit CurrentDevice(const pyeditfast_stream& stream) {
        status_ = cudaGetDevice(&before_);
        if (status_ == cudaSuccess && before_ != stream.device) {
            status_ = cudaSetDevice(stream.device);
            changed_ = status_ == cudaSuccess;
        }
    }
    ~CurrentDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    CurrentDevice(const CurrentDevice&) = delete;
    CurrentDevice& operator=(const CurrentDevice&) = delete;

    cudaError_t status() const { return status_; }

private:
    int before_ = 0;
    bool changed_ = false;
    cudaError_t status_;
};

// Queues a kernel. `name` and `sizes` are for the message of a failure.
template <typename... Parameters, typename... Arguments>
inline int launch(const char* name, const char* sizes, void (*kernel)(Parameters...), Grid grid,
                  int threads, std::size_t shared_bytes, const pyeditfast_stream& stream,
                  Message message, Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return kOk;
    const CurrentDevice current(stream);
    cudaError_t status = current.status();
    constexpr std::size_t kAlwaysAllowed = 48 << 10;
    if (status == cudaSuccess && shared_bytes > kAlwaysAllowed) {
        status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes));
    }
    if (status == cudaSuccess) {
        const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                          static_cast<unsigned>(grid.z));
        kernel<<<blocks, static_cast<unsigned>(threads), shared_bytes,
                 static_cast<cudaStream_t>(stream.handle)>>>(arguments...);
        status = cudaGetLastError();
    }
    if (status == cudaSuccess) return kOk;
    return fail(kSystemError, message, "%s (%s) could not be launched: %s", name, sizes,
                cudaGetErrorString(status));
}

// Queues a fill of `bytes` bytes with zeros.
inline int fill_with_zeros(const char* name, const char* sizes, void* place, std::size_t bytes,
                           const pyeditfast_stream& stream, Message message) {
    const CurrentDevice current(stream);
    cudaError_t status = current.status();
    if (status == cudaSuccess) {
        status = cudaMemsetAsync(place, 0, bytes, static_cast<cudaStream_t>(stream.handle));
    }
    if (status == cudaSuccess) return kOk;
    return fail(kSystemError, message, "%s (%s) could not clear its workspace: %s", name, sizes,
                cudaGetErrorString(status));
}

// Returns the number of multiprocessors of the stream's device, 0 where that cannot be told.
inline int multiprocessors(const pyeditfast_stream& stream) {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, stream.device);
    return count;
}

}  // namespace device
}  // namespace pyeditfast
