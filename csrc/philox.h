// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011).
#pragma once

#include <cstdint>

namespace pyeditfast {

struct PhiloxState {
    std::uint32_t c0, c1, c2, c3;
};

inline PhiloxState philox_round(PhiloxState state, std::uint32_t k0, std::uint32_t k1) {
    const std::uint64_t product_a = std::uint64_t{0xD2511F53u} * state.c0;
    const std::uint64_t product_b = std::uint64_t{0xCD9E8D57u} * state.c2;
    return {
        static_cast<std::uint32_t>(product_b >> 32) ^ state.c1 ^ k0,
        static_cast<std::uint32_t>(product_b),
        static_cast<std::uint32_t>(product_a >> 32) ^ state.c3 ^ k1,
        static_cast<std::uint32_t>(product_a),
    };
}

// The rounds are written out rather than looped over: compilers vectorize a loop over elements
// only when no loop is left inside it.
inline PhiloxState philox_4x32_10(PhiloxState state, std::uint32_t k0, std::uint32_t k1) {
    constexpr std::uint32_t kWeylA = 0x9E3779B9u;
    constexpr std::uint32_t kWeylB = 0xBB67AE85u;
    state = philox_round(state, k0, k1);
    state = philox_round(state, k0 + kWeylA, k1 + kWeylB);
    state = philox_round(state, k0 + 2 * kWeylA, k1 + 2 * kWeylB);
    state = philox_round(state, k0 + 3 * kWeylA, k1 + 3 * kWeylB);
    state = philox_round(state, k0 + 4 * kWeylA, k1 + 4 * kWeylB);
    state = philox_round(state, k0 + 5 * kWeylA, k1 + 5 * kWeylB);
    state = philox_round(state, k0 + 6 * kWeylA, k1 + 6 * kWeylB);
    state = philox_round(state, k0 + 7 * kWeylA, k1 + 7 * kWeylB);
    state = philox_round(state, k0 + 8 * kWeylA, k1 + 8 * kWeylB);
    state = philox_round(state, k0 + 9 * kWeylA, k1 + 9 * kWeylB);
    return state;
}

// Triton's map from 32 random bits to [0, 1): the bits read as a signed integer, folded onto
// [0, 2^31), rounded to float32, times the float32 below 2^-31, so that 1 is never reached.
inline float uniform_float(std::uint32_t bits) {
    const std::int32_t folded = static_cast<std::int32_t>(bits ^ (0u - (bits >> 31)));
    return static_cast<float>(folded) * 4.6566127342e-10f;
}

}  // namespace pyeditfast
