// A model's hidden activations on the device: those of kernels/activations.py, in float32.
#pragma once

#include <cmath>

#include "activations.h"
#include "device.h"

namespace pyeditfast {
namespace device {

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

// `activation` is an Activation of activations.h, whose own forms lose the last digits of small
// results. NaN stays NaN, and no finite number overflows on the way.
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
