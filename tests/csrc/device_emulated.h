// device.h on the CPU: see block_executor.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "block_executor.h"
#include "float_types.h"
#include "matrix.h"
#include "status.h"
#include "stream.h"

#define KERNEL
#define DEVICE
#define HOST_AND_DEVICE
#define LAUNCH_BOUNDS(threads, blocks)
#define UNROLL
#define NO_UNROLL

namespace pyeditfast {
namespace device {

inline int thread() { return emulated::thread(); }
inline int threads() { return emulated::threads(); }
inline std::int64_t block_x() { return emulated::block().x; }
inline std::int64_t block_y() { return emulated::block().y; }
inline std::int64_t block_z() { return emulated::block().z; }
inline std::int64_t blocks_x() { return emulated::blocks().x; }

inline void barrier() { emulated::barrier(); }

// An element of shared memory. It is read where a T is wanted, so never name one with `auto`.
template <typename T>
class SharedElement {
public:
    explicit SharedElement(std::size_t offset) : offset_(offset) {}

    operator T() const {
        T value;
        std::memcpy(&value, at(emulated::Access::kRead), sizeof value);
        return value;
    }
    SharedElement& operator=(T value) {
        std::memcpy(at(emulated::Access::kWrite), &value, sizeof value);
        return *this;
    }
    SharedElement& operator=(const SharedElement& other) { return *this = T(other); }
    SharedElement& operator+=(T value) { return *this = T(*this) + value; }
    SharedElement& operator-=(T value) { return *this = T(*this) - value; }
    SharedElement& operator*=(T value) { return *this = T(*this) * value; }

    T* at(emulated::Access access) const {
        return static_cast<T*>(emulated::shared_element(offset_, sizeof(T), access));
    }

private:
    std::size_t offset_;
};

template <typename T>
class Shared {
public:
    Shared(std::size_t start, std::int64_t count) : start_(start), count_(count) {}

    SharedElement<T> operator[](std::int64_t index) const {
        if (index < 0 || index >= count_) {
            emulated::fail("element " + std::to_string(index) + " of a shared array of " +
                           std::to_string(count_));
        }
        return SharedElement<T>(start_ + static_cast<std::size_t>(index) * sizeof(T));
    }
    Shared operator+(std::int64_t skipped) const {
        if (skipped < 0 || skipped > count_) {
            emulated::fail("a part that begins " + std::to_string(skipped) +
                           " elements into a shared array of " + std::to_string(count_));
        }
        return Shared(start_ + static_cast<std::size_t>(skipped) * sizeof(T), count_ - skipped);
    }

private:
    std::size_t start_;
    std::int64_t count_;
};

class SharedMemory {
public:
    template <typename T>
    Shared<T> take(int count) {
        const std::size_t start = used_;
        used_ += (static_cast<std::size_t>(count) * sizeof(T) + 15) / 16 * 16;
        if (used_ > emulated::shared_bytes()) {
            emulated::fail("it takes " + std::to_string(used_) + " bytes of shared memory, of " +
                           std::to_string(emulated::shared_bytes()));
        }
        return Shared<T>(start, count);
    }

private:
    std::size_t used_ = 0;
};

template <typename T>
inline T shuffle_xor(T value, int mask) {
    const unsigned char* const lanes = emulated::exchange("shuffle_xor", &value, sizeof value);
    const int other = (thread() % emulated::kWarpSize) ^ mask;
    std::memcpy(&value, lanes + static_cast<std::size_t>(other) * emulated::kMostExchanged,
                sizeof value);
    return value;
}

inline std::uint32_t ballot(bool predicate) {
    const unsigned char own = predicate ? 1 : 0;
    const unsigned char* const lanes = emulated::exchange("ballot", &own, 1);
    std::uint32_t bits = 0;
    for (std::size_t lane = 0; lane < emulated::kWarpSize; ++lane) {
        bits |= static_cast<std::uint32_t>(lanes[lane * emulated::kMostExchanged]) << lane;
    }
    return bits;
}

inline int count_bits(std::uint32_t bits) { return __builtin_popcount(bits); }

// Blocks run one after the other, and a thread is never interrupted.
template <typename T>
inline T atomic_add(T* place, T value) {
    const T before = *place;
    *place = before + value;
    return before;
}

inline std::uint32_t atomic_add(Shared<std::uint32_t> array, std::int64_t index,
                                std::uint32_t value) {
    return atomic_add(array[index].at(emulated::Access::kAtomic), value);
}

struct alignas(16) Words {
    std::uint32_t at[4];
};

inline Words load_16_bytes(const void* place) {
    if (reinterpret_cast<std::uintptr_t>(place) % 16 != 0) {
        emulated::fail("a load of 16 bytes that is not aligned");
    }
    Words words;
    std::memcpy(&words, place, sizeof words);
    return words;
}

inline Words load_16_bytes_to_keep(const void* place) { return load_16_bytes(place); }

inline Words load_16_bytes_if(bool condition, const void* place) {
    return condition ? load_16_bytes(place) : Words{};
}

inline Words load_16_bytes_to_keep_if(bool condition, const void* place) {
    return load_16_bytes_if(condition, place);
}

inline float float_of(std::uint32_t bits) { return as_float(bits); }
inline std::uint32_t bits_of(float value) { return as_bits(value); }

template <int type>
struct Element;

template <>
struct Element<kFloat32> {
    using Stored = float;
    static float load(float stored) { return stored; }
    static float store(float value) { return value; }
};

template <>
struct Element<kBFloat16> {
    using Stored = std::uint16_t;
    static float load(std::uint16_t stored) { return from_bfloat16(stored); }
    static std::uint16_t store(float value) { return to_bfloat16(value); }
};

template <>
struct Element<kFloat16> {
    using Stored = std::uint16_t;
    static float load(std::uint16_t stored) { return from_float16(stored); }
    static std::uint16_t store(float value) { return to_float16(value); }
};

// Sums are cut off, as the matrix unit does at the worst.
template <int type>
inline void multiply_16x8x16(float (&sums)[4], const std::uint32_t (&a)[4],
                             const std::uint32_t (&b)[2]) {
    std::uint32_t own[6];
    std::memcpy(own, a, sizeof a);
    std::memcpy(own + 4, b, sizeof b);
    const unsigned char* const lanes = emulated::exchange("multiply_16x8x16", own, sizeof own);
    const auto element = [lanes](int lane, int word, int half) {
        std::uint32_t bits;
        std::memcpy(&bits,
                    lanes + static_cast<std::size_t>(lane) * emulated::kMostExchanged +
                        static_cast<std::size_t>(word) * sizeof bits,
                    sizeof bits);
        const auto stored = static_cast<std::uint16_t>(half == 0 ? bits : bits >> 16);
        return static_cast<double>(Element<type>::load(stored));
    };
    const int group = thread() % 32 / 4, place = thread() % 4;
    for (int i = 0; i < 4; ++i) {
        const int upper = i / 2, column = 2 * place + i % 2;
        double exact = static_cast<double>(sums[i]);
        for (int k = 0; k < 16; ++k) {
            const int pair = k % 8 / 2;
            exact += element(group * 4 + pair, upper + 2 * (k / 8), k % 2) *
                     element(column * 4 + pair, 4 + k / 8, k % 2);
        }
        float cut = static_cast<float>(exact);
        if (std::isfinite(cut) && std::fabs(static_cast<double>(cut)) > std::fabs(exact)) {
            cut = std::nextafter(cut, 0.0f);
        }
        sums[i] = cut;
    }
}

struct Grid {
    std::int64_t x = 1;
    std::int64_t y = 1;
    std::int64_t z = 1;
};

template <typename... Parameters, typename... Arguments>
inline int launch(const char* name, const char* sizes, void (*kernel)(Parameters...), Grid grid,
                  int threads, std::size_t shared_bytes, const pyeditfast_stream&, Message message,
                  Arguments... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return kOk;
    const std::string problem =
        emulated::run({grid.x, grid.y, grid.z}, threads, shared_bytes,
                      [&] { kernel(static_cast<Parameters>(arguments)...); });
    if (problem.empty()) return kOk;
    return fail(kSystemError, message, "%s (%s) failed: %s", name, sizes, problem.c_str());
}

inline int fill_with_zeros(const char*, const char*, void* place, std::size_t bytes,
                           const pyeditfast_stream&, Message) {
    std::memset(place, 0, bytes);
    return kOk;
}

inline int multiprocessors(const pyeditfast_stream&) { return 3; }

}  // namespace device
}  // namespace pyeditfast
