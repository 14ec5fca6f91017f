// A model's hidden activations in float32, written so that every instruction set gives the same
// bits: no library function, no fused multiply-add, selections in place of branches.
#pragma once

#include "float_types.h"

namespace pyeditfast {

enum Activation : int {
    kNoActivation = 0,
    kRelu = 1,
    kSilu = 2,
    kGelu = 3,
    kGeluTanh = 4,
};

// e^x to about one unit in the last place, for x up to 88; larger ones count as 88, below -87 the
// result is about 1e-38. NaN stays NaN.
inline float exp_float(float x) {
    const float below = x > 88.0f ? 88.0f : x;
    const float clamped = below < -87.0f ? -87.0f : below;
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the lower bits.
    const float kRounding = 12582912.0f;
    const float shifted = clamped * 1.44269504f + kRounding;
    const float n = shifted - kRounding;
    // ln 2 in two parts: n times the first is exact.
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    // e^r = 1 + r + r^2 q(r) on |r| <= ln(2) / 2, q by least squares at Chebyshev points.
    float q = 0.0013934544986113906f;
    q = q * r + 0.008363776840269566f;
    q = q * r + 0.04166645556688309f;
    q = q * r + 0.16666573286056519f;
    q = q * r + 0.5f;
    const float power = (q * (r * r) + r) + 1.0f;
    return power * as_float((as_bits(shifted) << 23) + 0x3F800000u);
}

// The error function to about 1e-7: z p(z^2) below 0.9, else 1 - e^-p(z) with p close to
// -log(erfc z); both polynomials by least squares at Chebyshev points. NaN stays NaN.
inline float erf_float(float x) {
    const float magnitude = x < 0.0f ? -x : x;
    const float z = magnitude > 4.0f ? 4.0f : magnitude;
    const float t = z * z;
    float small = 8.531220373697579e-05f;
    small = small * t + -0.00081801344640553f;
    small = small * t + 0.005204278044402599f;
    small = small * t + -0.026860687881708145f;
    small = small * t + 0.11283718794584274f;
    small = small * t + -0.37612634897232056f;
    small = small * t + 1.128379225730896f;
    small = small * z;
    float p = -1.6056487766036298e-06f;
    p = p * z + 4.542376700555906e-05f;
    p = p * z + -0.000591357471421361f;
    p = p * z + 0.004733576439321041f;
    p = p * z + -0.02634573169052601f;
    p = p * z + 0.10994460433721542f;
    p = p * z + 0.6319730877876282f;
    p = p * z + 1.1301454305648804f;
    p = p * z + -0.00029792278655804694f;
    const float large = 1.0f - exp_float(-p);
    const float result = z > 0.9f ? large : small;
    return x < 0.0f ? -result : result;
}

inline float relu(float x) { return x < 0.0f ? 0.0f : x; }

inline float silu(float x) { return x / (1.0f + exp_float(-x)); }

inline float gelu(float x) { return (0.5f * x) * (1.0f + erf_float(x * 0.707106781f)); }

// (1 + tanh u) / 2 = 1 / (1 + e^-2u), with u = sqrt(2 / pi) (x + 0.044715 x^3).
inline float gelu_tanh(float x) {
    const float inner = x + 0.044715f * (x * x * x);
    return x / (1.0f + exp_float(-1.59576912f * inner));
}

}  // namespace pyeditfast
