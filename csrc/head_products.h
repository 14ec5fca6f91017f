// The two products of an output head with a few rows.
//
// A head's matrix is tall and is read a tile of its rows at a time: the second product finds in
// the cache what the first one brought there.
#pragma once

#include <cstdint>

namespace pyeditfast {

// The few rows are the lanes of vectors; there are a multiple of this many, zeros included.
constexpr std::int64_t kHeadLanes = 16;

// Says whether the processor has the vectors that the two functions are written for. Without them
// they give the same bits, slowly.
bool head_products_are_fast();

// A tile of a head's rows, one for each of `tokens`: row v has `width` numbers from
// rows[v * stride] on.
struct HeadTile {
    const float* rows;
    std::int64_t stride;
    std::int64_t tokens;
    std::int64_t width;
};

// logits[v * lanes + r] += sum over k of tile(v, k) x[k * lanes + r]. The sums are those of fused
// multiply-adds in parts of fixed length. Meanwhile the tile behind this one is fetched into the
// cache.
void add_logits(float* logits, const HeadTile& tile, const float* x, std::int64_t lanes);

// sums[r * width + k] += p[v * lanes + r] tile(v, k), for one v after the other by fused
// multiply-adds, for the first `rows` lanes r.
void add_weighted_tokens(float* sums, const HeadTile& tile, const float* p, std::int64_t rows,
                         std::int64_t lanes);

}  // namespace pyeditfast
