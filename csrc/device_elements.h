// What small kernels need of numbers whose type is known at run time, and a model's hidden
// activations on the device.
#pragma once

#include <cmath>
#include <cstdint>

#include "activations.h"
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

// 1 / (1 + e^-z) for the z of the sign of x and the given magnitude. Small results keep all their
// digits.
DEVICE inline float logistic(float x, float magnitude) {
    const float power = expf(-magnitude);
    return (x < 0.0f ? power : 1.0f) / (1.0f + power);
}

// The normal distribution function of the z of the sign of x and the given magnitude, up to 16.
// Small results keep all their digits: that of -a is e^(-a^2 / 2) P(1 / (1 + 0.3 a)), where P has
// been fitted for a from 0 to 16 to a relative error of 6e-8 (see kernels/activations.py).
DEVICE inline float normal_distribution(float x, float magnitude) {
    const float t = 1.0f / (1.0f + 0.3f * magnitude);
    float p = 0.03843867477071654f * t - 0.16945912681338973f;
    p = p * t + 0.22926411940500152f;
    p = p * t - 0.07719555880470841f;
    p = p * t + 0.14300998154907435f;
    p = p * t + 0.09448220201052919f;
    p = p * t + 0.12197160745495722f;
    p = p * t + 0.11948054446381334f;
    p = p * t + 7.585220533133291e-06f;
    const float tail = p * expf(-0.5f * magnitude * magnitude);
    return x < 0.0f ? tail : 1.0f - tail;
}

// The activations of kernels/activations.py: NaN stays NaN, and no finite number overflows on the
// way. Those of activations.h lose the last digits of small results.
DEVICE inline float activate(float x, int activation) {
    // Beyond it both forms of gelu are x or 0 to the last digit of float32.
    constexpr float kSaturated = 16.0f;
    const float magnitude = fabsf(x);
    const float near = fminf(magnitude, kSaturated);
    switch (activation) {
        case kRelu:
            return x < 0.0f ? 0.0f : x;
        case kSilu:
            return x * logistic(x, magnitude);
        case kGelu:
            return x * normal_distribution(x, near);
        case kGeluTanh:
            // Twice the root of 2 / pi.
            return x * logistic(x, 1.5957691216057308f * near * (1.0f + 0.044715f * near * near));
        default:
            return x;
    }
}

}  // namespace device
}  // namespace pyeditfast
