#include "chosen_products.h"

#include <cmath>

#include "intrinsics.h"

namespace {

using pyeditfast::kChoices;
using pyeditfast::Vectors;

// A sum is taken in so many parts on every instruction set.
constexpr int kLanes = 16;

#if defined(PYEDITFAST_WITH_AVX512) || defined(PYEDITFAST_WITH_AVX2)
// (p0 + p2) + (p1 + p3)
PYEDITFAST_TARGET("avx") [[maybe_unused]] float sum_of_four(__m128 parts) {
    const __m128 two = _mm_add_ps(parts, _mm_movehl_ps(parts, parts));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
PYEDITFAST_TARGET("avx") [[maybe_unused]] float sum_of_eight(__m256 parts) {
    return sum_of_four(
        _mm_add_ps(_mm256_castps256_ps128(parts), _mm256_extractf128_ps(parts, 1)));
}
#endif

// Writes the numbers of the bits and returns how many there are.
[[maybe_unused]] PYEDITFAST_INLINE int bits_of(int* places, std::uint32_t bits) {
    int count = 0;
    for (int r = 0; r < kChoices; ++r) {
        places[count] = r;
        count += bits >> r & 1;
    }
    return count;
}

namespace portable {
#define PYEDITFAST_PRODUCTS_TARGET [[maybe_unused]]
constexpr int kAtOnce = 2;

struct Lanes {
    float lane[kLanes];

    static Lanes zero() { return {}; }
    static Lanes load(const float* from) { return load_first(from, kLanes); }
    static Lanes load_first(const float* from, int count) {
        Lanes result = {};
        for (int i = 0; i < count; ++i) result.lane[i] = from[i];
        return result;
    }
    void add_product(const Lanes& a, const Lanes& b) {
        for (int i = 0; i < kLanes; ++i) lane[i] = std::fma(a.lane[i], b.lane[i], lane[i]);
    }
    float sum() const {
        float parts[kLanes];
        for (int i = 0; i < kLanes; ++i) parts[i] = lane[i];
        for (int half = kLanes / 2; half > 0; half /= 2) {
            for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
        }
        return parts[0];
    }
};

inline int places_of(int* places, std::uint32_t bits) { return bits_of(places, bits); }

#include "chosen_products_vectors.h"
#undef PYEDITFAST_PRODUCTS_TARGET
}  // namespace portable

#ifdef PYEDITFAST_WITH_AVX2
namespace avx2 {
#define PYEDITFAST_PRODUCTS_TARGET PYEDITFAST_TARGET("avx2,fma") [[maybe_unused]]
constexpr int kAtOnce = 5;

struct Lanes {
    __m256 low, high;

    PYEDITFAST_PRODUCTS_TARGET static Lanes zero() {
        return {_mm256_setzero_ps(), _mm256_setzero_ps()};
    }
    PYEDITFAST_PRODUCTS_TARGET static Lanes load(const float* from) {
        return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
    }
    PYEDITFAST_PRODUCTS_TARGET static Lanes load_first(const float* from, int count) {
        const __m256i places = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i in_low = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), places);
        const __m256i in_high = _mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), places);
        // Behind the last number there may be no memory, but the address is not read then.
        const float* high = count > 8 ? from + 8 : from;
        return {_mm256_maskload_ps(from, in_low), _mm256_maskload_ps(high, in_high)};
    }
    PYEDITFAST_PRODUCTS_TARGET void add_product(const Lanes& a, const Lanes& b) {
        low = _mm256_fmadd_ps(a.low, b.low, low);
        high = _mm256_fmadd_ps(a.high, b.high, high);
    }
    PYEDITFAST_PRODUCTS_TARGET float sum() const { return sum_of_eight(_mm256_add_ps(low, high)); }
};

PYEDITFAST_PRODUCTS_TARGET inline int places_of(int* places, std::uint32_t bits) {
    return bits_of(places, bits);
}

#include "chosen_products_vectors.h"
#undef PYEDITFAST_PRODUCTS_TARGET
}  // namespace avx2
#endif

#ifdef PYEDITFAST_WITH_AVX512
namespace avx512 {
#define PYEDITFAST_PRODUCTS_TARGET PYEDITFAST_TARGET("avx512f")
constexpr int kAtOnce = 8;

struct Lanes {
    __m512 lanes;

    PYEDITFAST_PRODUCTS_TARGET static Lanes zero() { return {_mm512_setzero_ps()}; }
    PYEDITFAST_PRODUCTS_TARGET static Lanes load(const float* from) {
        return {_mm512_loadu_ps(from)};
    }
    PYEDITFAST_PRODUCTS_TARGET static Lanes load_first(const float* from, int count) {
        return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from)};
    }
    PYEDITFAST_PRODUCTS_TARGET void add_product(const Lanes& a, const Lanes& b) {
        lanes = _mm512_fmadd_ps(a.lanes, b.lanes, lanes);
    }
    PYEDITFAST_PRODUCTS_TARGET float sum() const {
        // Not by the intrinsic for floats, which needs more than avx512f.
        const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(lanes), 1));
        return sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256(lanes), high));
    }
};

PYEDITFAST_PRODUCTS_TARGET inline int places_of(int* places, std::uint32_t bits) {
    __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    int count = 0;
    for (int first = 0; first < kChoices; first += 16) {
        const auto half = static_cast<__mmask16>(bits >> first);
        // A store of all 16 is faster than one that compresses; what is behind is overwritten.
        _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(half, numbers));
        count += __builtin_popcount(half);
        numbers = _mm512_add_epi32(numbers, _mm512_set1_epi32(16));
    }
    return count;
}

#include "chosen_products_vectors.h"
#undef PYEDITFAST_PRODUCTS_TARGET
}  // namespace avx512
#endif

struct Products {
    void (*add)(float*, std::int64_t, const Vectors&, const Vectors&, std::int64_t,
                const std::uint32_t*, std::int64_t);
    bool fast;
};

Products fastest() {
#ifdef PYEDITFAST_WITH_AVX512
    if (PYEDITFAST_HAS("avx512f")) return {avx512::add_chosen_products, true};
#endif
#ifdef PYEDITFAST_WITH_AVX2
    if (PYEDITFAST_HAS("avx2") && PYEDITFAST_HAS("fma")) return {avx2::add_chosen_products, true};
#endif
    return {portable::add_chosen_products, false};
}

const Products& products() {
    static const Products chosen = fastest();
    return chosen;
}

}  // namespace

namespace pyeditfast {

bool chosen_products_are_fast() { return products().fast; }

void add_chosen_products(float* sums, std::int64_t sums_stride, const Vectors& left,
                         const Vectors& right, std::int64_t length, const std::uint32_t* chosen,
                         std::int64_t chosen_stride) {
    products().add(sums, sums_stride, left, right, length, chosen, chosen_stride);
}

}  // namespace pyeditfast
