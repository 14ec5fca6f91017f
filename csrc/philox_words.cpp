#include "philox_words.h"

#include "intrinsics.h"
#include "philox.h"

// Compilers turn the products of 32-bit lanes into twice the instructions of what is written here:
// a word in each 64-bit lane, whose upper half may hold anything, since the multiplication of
// 32 by 32 bits reads the lower half only. So a product's upper half is brought down by a shuffle
// that repeats it: a shift would compete with the multiplications for the units that run both.
namespace {

constexpr std::uint64_t kMultiplierA = 0xD2511F53u;
constexpr std::uint64_t kMultiplierB = 0xCD9E8D57u;
constexpr std::uint32_t kKeyStepA = 0x9E3779B9u;
constexpr std::uint32_t kKeyStepB = 0xBB67AE85u;
constexpr int kRounds = 10;

[[maybe_unused]] void words_portable(std::uint32_t* __restrict out, std::int64_t count,
                                     std::uint64_t start, std::uint64_t step,
                                     std::uint64_t seed) {
    const auto k0 = static_cast<std::uint32_t>(seed);
    const auto k1 = static_cast<std::uint32_t>(seed >> 32);
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint64_t index = start + static_cast<std::uint64_t>(i) * step;
        const pyeditfast::PhiloxState counter = {static_cast<std::uint32_t>(index),
                                                 static_cast<std::uint32_t>(index >> 32), 0u, 0u};
        out[i] = pyeditfast::philox_4x32_10(counter, k0, k1).c0;
    }
}

#ifdef PYEDITFAST_WITH_AVX512
PYEDITFAST_TARGET("avx512f")
inline __m512i upper_halves(__m512i product) {
    return _mm512_shuffle_epi32(product, _MM_PERM_DDBB);
}

PYEDITFAST_TARGET("avx512f")
void words_avx512(std::uint32_t* __restrict out, std::int64_t count, std::uint64_t start,
                  std::uint64_t step, std::uint64_t seed) {
    constexpr std::int64_t kLanes = 8;
    constexpr int kXorOfThree = 0x96;
    const __m512i a = _mm512_set1_epi64(static_cast<long long>(kMultiplierA));
    const __m512i b = _mm512_set1_epi64(static_cast<long long>(kMultiplierB));
    __m512i k0[kRounds], k1[kRounds];
    for (int round = 0; round < kRounds; ++round) {
        k0[round] = _mm512_set1_epi64(static_cast<std::uint32_t>(seed) +
                                      static_cast<std::uint64_t>(round) * kKeyStepA);
        k1[round] = _mm512_set1_epi64(static_cast<std::uint32_t>(seed >> 32) +
                                      static_cast<std::uint64_t>(round) * kKeyStepB);
    }
    std::uint64_t first[kLanes];
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        first[lane] = start + static_cast<std::uint64_t>(lane) * step;
    }
    __m512i index = _mm512_loadu_si512(first);
    const __m512i stride = _mm512_set1_epi64(static_cast<long long>(kLanes * step));

    for (std::int64_t i = 0; i < count; i += kLanes) {
        // The first round, in which c2 and c3 are zero.
        __m512i product_a = _mm512_mul_epu32(index, a);
        __m512i c0 = _mm512_xor_si512(upper_halves(index), k0[0]);
        __m512i c1 = _mm512_setzero_si512();
        __m512i c2 = _mm512_xor_si512(upper_halves(product_a), k1[0]);
        __m512i c3 = product_a;
#pragma GCC unroll 16
        for (int round = 1; round < kRounds; ++round) {
            product_a = _mm512_mul_epu32(c0, a);
            const __m512i product_b = _mm512_mul_epu32(c2, b);
            c0 = _mm512_ternarylogic_epi64(upper_halves(product_b), c1, k0[round],
                                           kXorOfThree);
            c2 = _mm512_ternarylogic_epi64(upper_halves(product_a), c3, k1[round],
                                           kXorOfThree);
            c1 = product_b;
            c3 = product_a;
        }
        const auto present = static_cast<__mmask8>(
            count - i >= kLanes ? 0xFF : (1u << static_cast<unsigned>(count - i)) - 1u);
        _mm512_mask_cvtepi64_storeu_epi32(out + i, present, c0);
        index = _mm512_add_epi64(index, stride);
    }
}
#endif

#ifdef PYEDITFAST_WITH_AVX2
PYEDITFAST_TARGET("avx2")
inline __m256i upper_halves(__m256i product) { return _mm256_shuffle_epi32(product, 0xF5); }

PYEDITFAST_TARGET("avx2")
[[maybe_unused]] void words_avx2(std::uint32_t* __restrict out, std::int64_t count,
                                 std::uint64_t start, std::uint64_t step, std::uint64_t seed) {
    constexpr std::int64_t kLanes = 4;
    const __m256i a = _mm256_set1_epi64x(static_cast<long long>(kMultiplierA));
    const __m256i b = _mm256_set1_epi64x(static_cast<long long>(kMultiplierB));
    __m256i k0[kRounds], k1[kRounds];
    for (int round = 0; round < kRounds; ++round) {
        k0[round] = _mm256_set1_epi64x(static_cast<std::uint32_t>(seed) +
                                       static_cast<std::uint64_t>(round) * kKeyStepA);
        k1[round] = _mm256_set1_epi64x(static_cast<std::uint32_t>(seed >> 32) +
                                       static_cast<std::uint64_t>(round) * kKeyStepB);
    }
    __m256i index = _mm256_set_epi64x(
        static_cast<long long>(start + 3 * step), static_cast<long long>(start + 2 * step),
        static_cast<long long>(start + step), static_cast<long long>(start));
    const __m256i stride = _mm256_set1_epi64x(static_cast<long long>(kLanes * step));
    const __m256i lower_halves = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);

    for (std::int64_t i = 0; i < count; i += kLanes) {
        // The first round, in which c2 and c3 are zero.
        __m256i product_a = _mm256_mul_epu32(index, a);
        __m256i c0 = _mm256_xor_si256(upper_halves(index), k0[0]);
        __m256i c1 = _mm256_setzero_si256();
        __m256i c2 = _mm256_xor_si256(upper_halves(product_a), k1[0]);
        __m256i c3 = product_a;
#pragma GCC unroll 16
        for (int round = 1; round < kRounds; ++round) {
            product_a = _mm256_mul_epu32(c0, a);
            const __m256i product_b = _mm256_mul_epu32(c2, b);
            c0 = _mm256_xor_si256(_mm256_xor_si256(upper_halves(product_b), c1),
                                  k0[round]);
            c2 = _mm256_xor_si256(_mm256_xor_si256(upper_halves(product_a), c3),
                                  k1[round]);
            c1 = product_b;
            c3 = product_a;
        }
        const __m128i words =
            _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(c0, lower_halves));
        if (count - i >= kLanes) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), words);
        } else {
            alignas(16) std::uint32_t last[kLanes];
            _mm_store_si128(reinterpret_cast<__m128i*>(last), words);
            for (std::int64_t lane = 0; lane < count - i; ++lane) out[i + lane] = last[lane];
        }
        index = _mm256_add_epi64(index, stride);
    }
}
#endif

using Words = void (*)(std::uint32_t*, std::int64_t, std::uint64_t, std::uint64_t, std::uint64_t);

Words widest() {
#ifdef PYEDITFAST_WITH_AVX512
    if (PYEDITFAST_HAS("avx512f")) return words_avx512;
#endif
#ifdef PYEDITFAST_WITH_AVX2
    if (PYEDITFAST_HAS("avx2")) return words_avx2;
#endif
    return words_portable;
}

}  // namespace

void pyeditfast::philox_words(std::uint32_t* out, std::int64_t count, std::uint64_t start,
                              std::uint64_t step, std::uint64_t seed) {
    static const Words words = widest();
    words(out, count, start, step, seed);
}
