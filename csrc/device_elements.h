// Numbers whose type is known at run time, for kernels that are too small to be worth one form for
// every type.
#pragma once

#include <cstdint>

#include "device.h"

namespace pyeditfast {
namespace device {

// Returns element `index` of an array of an ElementType as float32.
DEVICE inline float load_element(const void* data, std::int64_t index, int type) {
    if (type == kFloat32) return static_cast<const float*>(data)[index];
    const std::uint16_t stored = static_cast<const std::uint16_t*>(data)[index];
    return type == kBFloat16 ? Element<kBFloat16>::load(stored) : Element<kFloat16>::load(stored);
}

// Writes a float32, rounded to nearest even.
DEVICE inline void store_element(void* data, std::int64_t index, int type, float value) {
    if (type == kFloat32) {
        static_cast<float*>(data)[index] = value;
    } else {
        static_cast<std::uint16_t*>(data)[index] = type == kBFloat16
                                                       ? Element<kBFloat16>::store(value)
                                                       : Element<kFloat16>::store(value);
    }
}

}  // namespace device
}  // namespace pyeditfast
