#include "head_products.h"

#include <algorithm>
#include <cmath>

#include "intrinsics.h"

namespace {

using pyeditfast::HeadTile;
using pyeditfast::kHeadLanes;

// Steps of a logit's sum that are taken at once: that much of x stays in the first-level cache, and
// a long sum in parts is more accurate.
constexpr std::int64_t kSteps = 256;

constexpr std::int64_t kLine = 16;

// Has the cache line of an address, which may lie behind a matrix, fetched into the second-level
// cache.
PYEDITFAST_INLINE void fetch(const float* from) {
#if defined(__GNUC__)
    __builtin_prefetch(from, 0, 2);
#else
    static_cast<void>(from);
#endif
}

namespace portable {
#define PYEDITFAST_HEAD_TARGET [[maybe_unused]]
constexpr int kTokens = 4, kRows = 2, kVectors = 2;

struct Floats {
    static constexpr int kLanes = 4;
    float lane[kLanes];

    static Floats all(float value) { return {{value, value, value, value}}; }
    static Floats load(const float* from) { return {{from[0], from[1], from[2], from[3]}}; }
    void add_product(const Floats& a, const Floats& b) {
        for (int i = 0; i < kLanes; ++i) lane[i] = std::fma(a.lane[i], b.lane[i], lane[i]);
    }
    void store(float* to) const {
        for (int i = 0; i < kLanes; ++i) to[i] = lane[i];
    }
    void add_to(float* to) const {
        for (int i = 0; i < kLanes; ++i) to[i] += lane[i];
    }
};

#include "head_products_vectors.h"
#undef PYEDITFAST_HEAD_TARGET
}  // namespace portable

#ifdef PYEDITFAST_WITH_AVX2
namespace avx2 {
#define PYEDITFAST_HEAD_TARGET PYEDITFAST_TARGET("avx2,fma") [[maybe_unused]]
constexpr int kTokens = 4, kRows = 6, kVectors = 2;

struct Floats {
    static constexpr int kLanes = 8;
    __m256 lanes;

    PYEDITFAST_HEAD_TARGET static Floats all(float value) { return {_mm256_set1_ps(value)}; }
    PYEDITFAST_HEAD_TARGET static Floats load(const float* from) { return {_mm256_loadu_ps(from)}; }
    PYEDITFAST_HEAD_TARGET void add_product(const Floats& a, const Floats& b) {
        lanes = _mm256_fmadd_ps(a.lanes, b.lanes, lanes);
    }
    PYEDITFAST_HEAD_TARGET void store(float* to) const { _mm256_storeu_ps(to, lanes); }
    PYEDITFAST_HEAD_TARGET void add_to(float* to) const {
        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), lanes));
    }
};

#include "head_products_vectors.h"
#undef PYEDITFAST_HEAD_TARGET
}  // namespace avx2
#endif

#ifdef PYEDITFAST_WITH_AVX512
namespace avx512 {
#define PYEDITFAST_HEAD_TARGET PYEDITFAST_TARGET("avx512f")
constexpr int kTokens = 8, kRows = 6, kVectors = 4;

struct Floats {
    static constexpr int kLanes = 16;
    __m512 lanes;

    PYEDITFAST_HEAD_TARGET static Floats all(float value) { return {_mm512_set1_ps(value)}; }
    PYEDITFAST_HEAD_TARGET static Floats load(const float* from) { return {_mm512_loadu_ps(from)}; }
    PYEDITFAST_HEAD_TARGET void add_product(const Floats& a, const Floats& b) {
        lanes = _mm512_fmadd_ps(a.lanes, b.lanes, lanes);
    }
    PYEDITFAST_HEAD_TARGET void store(float* to) const { _mm512_storeu_ps(to, lanes); }
    PYEDITFAST_HEAD_TARGET void add_to(float* to) const {
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), lanes));
    }
};

#include "head_products_vectors.h"
#undef PYEDITFAST_HEAD_TARGET
}  // namespace avx512
#endif

struct Products {
    void (*add_logits)(float*, const HeadTile&, const float*, std::int64_t);
    void (*add_weighted_tokens)(float*, const HeadTile&, const float*, std::int64_t, std::int64_t);
    bool fast;
};

Products fastest() {
#ifdef PYEDITFAST_WITH_AVX512
    if (PYEDITFAST_HAS("avx512f")) return {avx512::add_logits, avx512::add_weighted_tokens, true};
#endif
#ifdef PYEDITFAST_WITH_AVX2
    if (PYEDITFAST_HAS("avx2") && PYEDITFAST_HAS("fma")) {
        return {avx2::add_logits, avx2::add_weighted_tokens, true};
    }
#endif
    return {portable::add_logits, portable::add_weighted_tokens, false};
}

const Products& products() {
    static const Products chosen = fastest();
    return chosen;
}

}  // namespace

namespace pyeditfast {

bool head_products_are_fast() { return products().fast; }

void add_logits(float* logits, const HeadTile& tile, const float* x, std::int64_t lanes) {
    products().add_logits(logits, tile, x, lanes);
}

void add_weighted_tokens(float* sums, const HeadTile& tile, const float* p, std::int64_t rows,
                         std::int64_t lanes) {
    products().add_weighted_tokens(sums, tile, p, rows, lanes);
}

}  // namespace pyeditfast
