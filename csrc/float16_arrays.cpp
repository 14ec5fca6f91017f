#include "float16_arrays.h"

#include <cstring>

#include "float_types.h"
#include "intrinsics.h"

namespace {

// What is not a whole vector is converted in one with zeros behind it.
template <std::int64_t kLanes, typename Out, typename In, typename Convert>
inline void convert_rest(Out* out, const In* in, std::int64_t count, const Convert& convert) {
    if (count == 0) return;
    In from[kLanes] = {};
    Out to[kLanes];
    std::memcpy(from, in, static_cast<std::size_t>(count) * sizeof(In));
    convert(to, from, kLanes);
    std::memcpy(out, to, static_cast<std::size_t>(count) * sizeof(Out));
}

#ifdef PYEDITFAST_WITH_AVX512
PYEDITFAST_TARGET("avx512f")
void widen_avx512(float* out, const std::uint16_t* in, std::int64_t count) {
    constexpr std::int64_t kLanes = 16;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
        _mm512_storeu_ps(out + i, _mm512_cvtph_ps(halves));
    }
    convert_rest<kLanes>(out + i, in + i, count - i, widen_avx512);
}

PYEDITFAST_TARGET("avx512f")
void narrow_avx512(std::uint16_t* out, const float* in, std::int64_t count) {
    constexpr std::int64_t kLanes = 16;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const __m256i halves = _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), halves);
    }
    convert_rest<kLanes>(out + i, in + i, count - i, narrow_avx512);
}
#endif

#ifdef PYEDITFAST_WITH_F16C
PYEDITFAST_TARGET("f16c")
[[maybe_unused]] void widen_f16c(float* out, const std::uint16_t* in, std::int64_t count) {
    constexpr std::int64_t kLanes = 8;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(halves));
    }
    convert_rest<kLanes>(out + i, in + i, count - i, widen_f16c);
}

PYEDITFAST_TARGET("f16c")
[[maybe_unused]] void narrow_f16c(std::uint16_t* out, const float* in, std::int64_t count) {
    constexpr std::int64_t kLanes = 8;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), halves);
    }
    convert_rest<kLanes>(out + i, in + i, count - i, narrow_f16c);
}
#endif

[[maybe_unused]] void widen_portable(float* __restrict out, const std::uint16_t* __restrict in,
                                     std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = pyeditfast::from_float16(in[i]);
}

[[maybe_unused]] void narrow_portable(std::uint16_t* __restrict out, const float* __restrict in,
                                      std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = pyeditfast::to_float16(in[i]);
}

struct Conversion {
    void (*widen)(float*, const std::uint16_t*, std::int64_t);
    void (*narrow)(std::uint16_t*, const float*, std::int64_t);
};

Conversion widest() {
#ifdef PYEDITFAST_WITH_AVX512
    if (PYEDITFAST_HAS("avx512f")) return {widen_avx512, narrow_avx512};
#endif
#ifdef PYEDITFAST_WITH_F16C
    if (PYEDITFAST_HAS("f16c")) return {widen_f16c, narrow_f16c};
#endif
    return {widen_portable, narrow_portable};
}

const Conversion& conversion() {
    static const Conversion chosen = widest();
    return chosen;
}

}  // namespace

void pyeditfast::widen_float16(float* out, const std::uint16_t* in, std::int64_t count) {
    conversion().widen(out, in, count);
}

void pyeditfast::narrow_to_float16(std::uint16_t* out, const float* in, std::int64_t count) {
    conversion().narrow(out, in, count);
}
