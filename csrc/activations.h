// A model's hidden activations in float32, written so that every instruction set gives the same
// bits: no library function, no fused multiply-add, selections in place of branches.
#pragma once

#include "float_types.h"
#include "vector_clones.h"

namespace pyeditfast {

enum Activation : int {
    kNoActivation = 0,
    kRelu = 1,
    kSilu = 2,
    kGelu = 3,
    kGeluTanh = 4,
};

// The magnitude of x, cut to `limit`; NaN counts as large. In integers: code behind a selection of
// floats by their order is compiled once for the limit and once for the rest, divisions included.
PYEDITFAST_INLINE float limited_magnitude(float x, float limit) {
    const std::uint32_t magnitude = as_bits(x) & 0x7FFFFFFFu;
    const std::uint32_t largest = as_bits(limit);
    return as_float(magnitude < largest ? magnitude : largest);
}

// e^x to about one unit in the last place, for x from -87 to 87; what lies beyond, and NaN, counts
// as the nearer of the two.
PYEDITFAST_INLINE float exp_float(float x) {
    const float magnitude = limited_magnitude(x, 87.0f);
    const float limited = as_float(as_bits(magnitude) | (as_bits(x) & 0x80000000u));
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the lower bits.
    const float kRounding = 12582912.0f;
    const float shifted = limited * 1.44269504f + kRounding;
    const float n = shifted - kRounding;
    // ln 2 in two parts: n times the first is exact.
    const float r = (limited - n * 0.693359375f) + n * 2.12194440e-4f;
    // e^r = 1 + r + r^2 q(r) on |r| <= ln(2) / 2, q by least squares at Chebyshev points.
    float q = 0.0013934544986113906f;
    q = q * r + 0.008363776840269566f;
    q = q * r + 0.04166645556688309f;
    q = q * r + 0.16666573286056519f;
    q = q * r + 0.5f;
    const float power = (q * (r * r) + r) + 1.0f;
    return power * as_float((as_bits(shifted) << 23) + 0x3F800000u);
}

// 2^-x / 2 for x from 0 to 60. 2^r = 1 + r p(r) on |r| <= 1/2, p by weighted least squares.
PYEDITFAST_INLINE float half_power(float x) {
    const float kRounding = 12582912.0f;
    const float shifted = kRounding - x;
    const float r = (kRounding - shifted) - x;
    float p = 0.00015353361959569156f;
    p = p * r + 0.0013398875016719103f;
    p = p * r + 0.00961843691766262f;
    p = p * r + 0.055503323674201965f;
    p = p * r + 0.24022647738456726f;
    p = p * r + 0.6931471824645996f;
    const float power = p * r + 1.0f;
    return power * as_float((as_bits(shifted) << 23) + 0x3F000000u);
}

PYEDITFAST_INLINE float relu(float x) { return x < 0.0f ? 0.0f : x; }

// relu(x) - |x| erfc(|x| / sqrt 2) / 2, where erfc(z / sqrt 2) = 2^-q(z), q by least squares that
// weigh an error as the result does.
PYEDITFAST_INLINE float gelu(float x) {
    const float z = limited_magnitude(x, 6.0f);
    float q = 2.8349129479465773e-06f;
    q = q * z + -3.9377689972752705e-05f;
    q = q * z + 0.000186180230230093f;
    q = q * z + 0.0001369364035781473f;
    q = q * z + -0.00706342002376914f;
    q = q * z + 0.052496179938316345f;
    q = q * z + 0.4592081904411316f;
    q = q * z + 1.1511051654815674f;
    return relu(x) - z * half_power(q * z);
}

PYEDITFAST_INLINE float silu(float x) { return x / (1.0f + exp_float(-x)); }

// (1 + tanh u) / 2 = 1 / (1 + e^-2u), with u = sqrt(2 / pi) (x + 0.044715 x^3).
PYEDITFAST_INLINE float gelu_tanh(float x) {
    const float inner = x + 0.044715f * (x * x * x);
    return x / (1.0f + exp_float(-1.59576912f * inner));
}

}  // namespace pyeditfast
