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

using pyeditfast::PhiloxState;

// Word `number` of the block, which is where the element of that index modulo 4 lies.
inline std::uint32_t word_of(const PhiloxState& block, std::uint64_t number) {
    const std::uint32_t low = (number & 1) == 0 ? block.c0 : block.c1;
    const std::uint32_t high = (number & 1) == 0 ? block.c2 : block.c3;
    return (number & 2) == 0 ? low : high;
}

inline PhiloxState block_of(std::uint64_t number, std::uint64_t seed) {
    const PhiloxState counter = {static_cast<std::uint32_t>(number),
                                 static_cast<std::uint32_t>(number >> 32), 0u, 0u};
    return pyeditfast::philox_4x32_10(counter, static_cast<std::uint32_t>(seed),
                                      static_cast<std::uint32_t>(seed >> 32));
}

// Every instruction set has two functions: one writes the words of whole blocks from `block` on, of
// which the last may be cut off, the other those of elements `step` apart, each from its own block.

[[maybe_unused]] void blocks_portable(std::uint32_t* __restrict out, std::int64_t count,
                                      std::uint64_t block, std::uint64_t seed) {
    const std::int64_t whole = count / 4;
    for (std::int64_t i = 0; i < whole; ++i) {
        const PhiloxState words = block_of(block + static_cast<std::uint64_t>(i), seed);
        out[4 * i] = words.c0;
        out[4 * i + 1] = words.c1;
        out[4 * i + 2] = words.c2;
        out[4 * i + 3] = words.c3;
    }
    if (4 * whole == count) return;
    const PhiloxState last = block_of(block + static_cast<std::uint64_t>(whole), seed);
    for (std::int64_t i = 4 * whole; i < count; ++i) {
        out[i] = word_of(last, static_cast<std::uint64_t>(i));
    }
}

[[maybe_unused]] void strided_portable(std::uint32_t* __restrict out, std::int64_t count,
                                       std::uint64_t start, std::uint64_t step,
                                       std::uint64_t seed) {
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint64_t index = start + static_cast<std::uint64_t>(i) * step;
        out[i] = word_of(block_of(index >> 2, seed), index);
    }
}

// Elements that are a multiple of four apart take the same word of their blocks, so that what only
// the other three need is not computed. Any other step has no such number.
[[maybe_unused]] constexpr int kAnyWord = -1;

#ifdef PYEDITFAST_WITH_AVX512
PYEDITFAST_TARGET("avx512f")
inline __m512i upper_halves(__m512i product) {
    return _mm512_shuffle_epi32(product, _MM_PERM_DDBB);
}

// The words of eight blocks, in the lower halves of 64-bit lanes.
struct Blocks512 {
    __m512i c0, c1, c2, c3;
};

struct Keys512 {
    __m512i k0[kRounds], k1[kRounds];
};

PYEDITFAST_TARGET("avx512f")
inline Keys512 keys_avx512(std::uint64_t seed) {
    Keys512 keys;
    for (int round = 0; round < kRounds; ++round) {
        keys.k0[round] = _mm512_set1_epi64(static_cast<std::uint32_t>(seed) +
                                           static_cast<std::uint64_t>(round) * kKeyStepA);
        keys.k1[round] = _mm512_set1_epi64(static_cast<std::uint32_t>(seed >> 32) +
                                           static_cast<std::uint64_t>(round) * kKeyStepB);
    }
    return keys;
}

PYEDITFAST_TARGET("avx512f")
PYEDITFAST_INLINE Blocks512 blocks_of(__m512i number, const Keys512& keys) {
    constexpr int kXorOfThree = 0x96;
    const __m512i a = _mm512_set1_epi64(static_cast<long long>(kMultiplierA));
    const __m512i b = _mm512_set1_epi64(static_cast<long long>(kMultiplierB));
    // The first round, in which c2 and c3 are zero.
    __m512i product_a = _mm512_mul_epu32(number, a);
    __m512i c0 = _mm512_xor_si512(upper_halves(number), keys.k0[0]);
    __m512i c1 = _mm512_setzero_si512();
    __m512i c2 = _mm512_xor_si512(upper_halves(product_a), keys.k1[0]);
    __m512i c3 = product_a;
#pragma GCC unroll 16
    for (int round = 1; round < kRounds; ++round) {
        product_a = _mm512_mul_epu32(c0, a);
        const __m512i product_b = _mm512_mul_epu32(c2, b);
        c0 = _mm512_ternarylogic_epi64(upper_halves(product_b), c1, keys.k0[round], kXorOfThree);
        c2 = _mm512_ternarylogic_epi64(upper_halves(product_a), c3, keys.k1[round], kXorOfThree);
        c1 = product_b;
        c3 = product_a;
    }
    return {c0, c1, c2, c3};
}

PYEDITFAST_TARGET("avx512f")
void blocks_avx512(std::uint32_t* __restrict out, std::int64_t count, std::uint64_t block,
                   std::uint64_t seed) {
    constexpr std::int64_t kWords = 32;
    constexpr __mmask16 kUpperHalves = 0xAAAA;
    const Keys512 keys = keys_avx512(seed);
    // In this order of blocks, halves that lie side by side in 128 bits end up side by side.
    __m512i number = _mm512_add_epi64(_mm512_set1_epi64(static_cast<long long>(block)),
                                      _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
    for (std::int64_t i = 0; i < count; i += kWords) {
        const Blocks512 words = blocks_of(number, keys);
        const __m512i low =
            _mm512_mask_shuffle_epi32(words.c0, kUpperHalves, words.c1, _MM_PERM_CCAA);
        const __m512i high =
            _mm512_mask_shuffle_epi32(words.c2, kUpperHalves, words.c3, _MM_PERM_CCAA);
        const __m512i first = _mm512_unpacklo_epi64(low, high);
        const __m512i second = _mm512_unpackhi_epi64(low, high);
        if (count - i >= kWords) {
            _mm512_storeu_si512(out + i, first);
            _mm512_storeu_si512(out + i + kWords / 2, second);
        } else {
            const std::uint32_t present = (1u << static_cast<unsigned>(count - i)) - 1u;
            _mm512_mask_storeu_epi32(out + i, static_cast<__mmask16>(present), first);
            _mm512_mask_storeu_epi32(out + i + kWords / 2, static_cast<__mmask16>(present >> 16),
                                     second);
        }
        number = _mm512_add_epi64(number, _mm512_set1_epi64(kWords / 4));
    }
}

template <int kNumber>
PYEDITFAST_TARGET("avx512f")
PYEDITFAST_INLINE __m512i word_of(const Blocks512& words, __m512i index) {
    if (kNumber == 0) return words.c0;
    if (kNumber == 1) return words.c1;
    if (kNumber == 2) return words.c2;
    if (kNumber == 3) return words.c3;
    const __mmask8 odd = _mm512_test_epi64_mask(index, _mm512_set1_epi64(1));
    const __mmask8 late = _mm512_test_epi64_mask(index, _mm512_set1_epi64(2));
    const __m512i low = _mm512_mask_mov_epi64(words.c0, odd, words.c1);
    const __m512i high = _mm512_mask_mov_epi64(words.c2, odd, words.c3);
    return _mm512_mask_mov_epi64(low, late, high);
}

template <int kNumber>
PYEDITFAST_TARGET("avx512f")
void strided_avx512(std::uint32_t* __restrict out, std::int64_t count, std::uint64_t start,
                    std::uint64_t step, std::uint64_t seed) {
    constexpr std::int64_t kLanes = 8;
    const Keys512 keys = keys_avx512(seed);
    std::uint64_t first[kLanes];
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        first[lane] = start + static_cast<std::uint64_t>(lane) * step;
    }
    __m512i index = _mm512_loadu_si512(first);
    const __m512i stride = _mm512_set1_epi64(static_cast<long long>(kLanes * step));
    for (std::int64_t i = 0; i < count; i += kLanes) {
        const Blocks512 words = blocks_of(_mm512_srli_epi64(index, 2), keys);
        const auto present = static_cast<__mmask8>(
            count - i >= kLanes ? 0xFF : (1u << static_cast<unsigned>(count - i)) - 1u);
        _mm512_mask_cvtepi64_storeu_epi32(out + i, present, word_of<kNumber>(words, index));
        index = _mm512_add_epi64(index, stride);
    }
}
#endif

#ifdef PYEDITFAST_WITH_AVX2
PYEDITFAST_TARGET("avx2")
inline __m256i upper_halves(__m256i product) { return _mm256_shuffle_epi32(product, 0xF5); }

// The words of four blocks, in the lower halves of 64-bit lanes.
struct Blocks256 {
    __m256i c0, c1, c2, c3;
};

struct Keys256 {
    __m256i k0[kRounds], k1[kRounds];
};

PYEDITFAST_TARGET("avx2")
inline Keys256 keys_avx2(std::uint64_t seed) {
    Keys256 keys;
    for (int round = 0; round < kRounds; ++round) {
        keys.k0[round] = _mm256_set1_epi64x(static_cast<std::uint32_t>(seed) +
                                            static_cast<std::uint64_t>(round) * kKeyStepA);
        keys.k1[round] = _mm256_set1_epi64x(static_cast<std::uint32_t>(seed >> 32) +
                                            static_cast<std::uint64_t>(round) * kKeyStepB);
    }
    return keys;
}

PYEDITFAST_TARGET("avx2")
PYEDITFAST_INLINE Blocks256 blocks_of(__m256i number, const Keys256& keys) {
    const __m256i a = _mm256_set1_epi64x(static_cast<long long>(kMultiplierA));
    const __m256i b = _mm256_set1_epi64x(static_cast<long long>(kMultiplierB));
    // The first round, in which c2 and c3 are zero.
    __m256i product_a = _mm256_mul_epu32(number, a);
    __m256i c0 = _mm256_xor_si256(upper_halves(number), keys.k0[0]);
    __m256i c1 = _mm256_setzero_si256();
    __m256i c2 = _mm256_xor_si256(upper_halves(product_a), keys.k1[0]);
    __m256i c3 = product_a;
#pragma GCC unroll 16
    for (int round = 1; round < kRounds; ++round) {
        product_a = _mm256_mul_epu32(c0, a);
        const __m256i product_b = _mm256_mul_epu32(c2, b);
        c0 = _mm256_xor_si256(_mm256_xor_si256(upper_halves(product_b), c1), keys.k0[round]);
        c2 = _mm256_xor_si256(_mm256_xor_si256(upper_halves(product_a), c3), keys.k1[round]);
        c1 = product_b;
        c3 = product_a;
    }
    return {c0, c1, c2, c3};
}

PYEDITFAST_TARGET("avx2")
[[maybe_unused]] void blocks_avx2(std::uint32_t* __restrict out, std::int64_t count,
                                  std::uint64_t block, std::uint64_t seed) {
    constexpr std::int64_t kWords = 16;
    constexpr int kUpperHalves = 0xAA, kLowerHalvesTwice = 0xA0;
    const Keys256 keys = keys_avx2(seed);
    // In this order of blocks, halves that lie side by side in 128 bits end up side by side.
    __m256i number = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<long long>(block)),
                                      _mm256_set_epi64x(3, 1, 2, 0));
    for (std::int64_t i = 0; i < count; i += kWords) {
        const Blocks256 words = blocks_of(number, keys);
        const __m256i low = _mm256_blend_epi32(
            words.c0, _mm256_shuffle_epi32(words.c1, kLowerHalvesTwice), kUpperHalves);
        const __m256i high = _mm256_blend_epi32(
            words.c2, _mm256_shuffle_epi32(words.c3, kLowerHalvesTwice), kUpperHalves);
        alignas(32) std::uint32_t last[kWords];
        std::uint32_t* to = count - i >= kWords ? out + i : last;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_unpacklo_epi64(low, high));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kWords / 2),
                            _mm256_unpackhi_epi64(low, high));
        if (to == last) {
            for (std::int64_t word = 0; word < count - i; ++word) out[i + word] = last[word];
        }
        number = _mm256_add_epi64(number, _mm256_set1_epi64x(kWords / 4));
    }
}

template <int kNumber>
PYEDITFAST_TARGET("avx2")
PYEDITFAST_INLINE __m256i word_of(const Blocks256& words, __m256i index) {
    if (kNumber == 0) return words.c0;
    if (kNumber == 1) return words.c1;
    if (kNumber == 2) return words.c2;
    if (kNumber == 3) return words.c3;
    // The highest bit of a lane decides.
    const __m256d odd = _mm256_castsi256_pd(_mm256_slli_epi64(index, 63));
    const __m256d late = _mm256_castsi256_pd(_mm256_slli_epi64(index, 62));
    const __m256d low = _mm256_blendv_pd(_mm256_castsi256_pd(words.c0),
                                         _mm256_castsi256_pd(words.c1), odd);
    const __m256d high = _mm256_blendv_pd(_mm256_castsi256_pd(words.c2),
                                          _mm256_castsi256_pd(words.c3), odd);
    return _mm256_castpd_si256(_mm256_blendv_pd(low, high, late));
}

template <int kNumber>
PYEDITFAST_TARGET("avx2")
[[maybe_unused]] void strided_avx2(std::uint32_t* __restrict out, std::int64_t count,
                                   std::uint64_t start, std::uint64_t step, std::uint64_t seed) {
    constexpr std::int64_t kLanes = 4;
    const Keys256 keys = keys_avx2(seed);
    __m256i index = _mm256_set_epi64x(
        static_cast<long long>(start + 3 * step), static_cast<long long>(start + 2 * step),
        static_cast<long long>(start + step), static_cast<long long>(start));
    const __m256i stride = _mm256_set1_epi64x(static_cast<long long>(kLanes * step));
    const __m256i lower_halves = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    for (std::int64_t i = 0; i < count; i += kLanes) {
        const Blocks256 blocks = blocks_of(_mm256_srli_epi64(index, 2), keys);
        const __m128i words = _mm256_castsi256_si128(
            _mm256_permutevar8x32_epi32(word_of<kNumber>(blocks, index), lower_halves));
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

using Strided = void (*)(std::uint32_t*, std::int64_t, std::uint64_t, std::uint64_t, std::uint64_t);

struct Functions {
    void (*blocks)(std::uint32_t*, std::int64_t, std::uint64_t, std::uint64_t);
    Strided strided;
    Strided strided_by_fours[4];
};

Functions widest() {
#ifdef PYEDITFAST_WITH_AVX512
    if (PYEDITFAST_HAS("avx512f")) {
        return {blocks_avx512, strided_avx512<kAnyWord>,
                {strided_avx512<0>, strided_avx512<1>, strided_avx512<2>, strided_avx512<3>}};
    }
#endif
#ifdef PYEDITFAST_WITH_AVX2
    if (PYEDITFAST_HAS("avx2")) {
        return {blocks_avx2, strided_avx2<kAnyWord>,
                {strided_avx2<0>, strided_avx2<1>, strided_avx2<2>, strided_avx2<3>}};
    }
#endif
    return {blocks_portable, strided_portable,
            {strided_portable, strided_portable, strided_portable, strided_portable}};
}

}  // namespace

void pyeditfast::philox_words(std::uint32_t* out, std::int64_t count, std::uint64_t start,
                              std::uint64_t step, std::uint64_t seed) {
    static const Functions functions = widest();
    if (step == 1) {
        const std::uint64_t number = start & 3;
        std::int64_t before = 0;
        if (number != 0) {
            const PhiloxState block = block_of(start >> 2, seed);
            while (before < count && number + static_cast<std::uint64_t>(before) < 4) {
                out[before] = word_of(block, number + static_cast<std::uint64_t>(before));
                ++before;
            }
        }
        functions.blocks(out + before, count - before,
                         (start + static_cast<std::uint64_t>(before)) >> 2, seed);
    } else if (step % 4 == 0) {
        functions.strided_by_fours[start & 3](out, count, start, step, seed);
    } else {
        functions.strided(out, count, start, step, seed);
    }
}
