// float32, bfloat16 and float16 as bits: integer arithmetic with selections, which every
// instruction set vectorizes to the same result. Rounding is to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace pyeditfast {

inline float as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint32_t as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float from_bfloat16(std::uint16_t value) {
    return as_float(static_cast<std::uint32_t>(value) << 16);
}

inline std::uint16_t to_bfloat16(float value) {
    const std::uint32_t bits = as_bits(value);
    const std::uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    const std::uint32_t quiet = bits | 0x00400000u;
    // Shifted last: compilers would narrow the selection to 16 bits, which takes twice the time.
    return static_cast<std::uint16_t>((value != value ? quiet : rounded) >> 16);
}

inline float from_float16(std::uint16_t value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value & 0x8000u) << 16;
    const std::uint32_t magnitude = static_cast<std::uint32_t>(value & 0x7FFFu) << 13;
    const std::uint32_t normal = magnitude + (112u << 23);
    // 2^-14 (1 + m) - 2^-14: exact, and without a subnormal number on the way.
    const float subnormal = as_float(magnitude + (113u << 23)) - as_float(113u << 23);
    const std::uint32_t infinite = magnitude + (224u << 23);
    std::uint32_t bits = magnitude < 0x00800000u ? as_bits(subnormal) : normal;
    bits = magnitude >= 0x0F800000u ? infinite : bits;
    return as_float(bits | sign);
}

inline std::uint16_t to_float16(float value) {
    const std::uint32_t bits = as_bits(value);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    const std::uint32_t normal =
        (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    // The last place of numbers in [0.5, 1) is that of float16's subnormal numbers.
    const std::uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    const std::uint32_t nan = 0x7E00u | ((magnitude >> 13) & 0x03FFu);
    const std::uint32_t special = magnitude > 0x7F800000u ? nan : 0x7C00u;
    std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u ? special : half;
    return static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000u));
}

}  // namespace pyeditfast
