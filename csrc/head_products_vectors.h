// The products of head_products.h on one instruction set: included once for each, in a namespace of
// its own that has Floats, kTokens, kRows and kVectors. No include guard.
//
// Sums stay in registers for many steps, enough of them at a time to hide how long a fused
// multiply-add takes. How they are shared out over registers does not change their bits.

// The sums of kCount rows of a tile, kHeadLanes of each. The rows from `next` on, unless it is null,
// are fetched into the cache meanwhile, a line a step.
template <int kCount>
PYEDITFAST_HEAD_TARGET void logits_block(float* logits, const float* rows, std::int64_t stride,
                                         const float* x, std::int64_t lanes, std::int64_t steps,
                                         const float* next) {
    constexpr int kParts = kHeadLanes / Floats::kLanes;
    Floats sums[kCount][kParts];
    for (int v = 0; v < kCount; ++v) {
        for (int i = 0; i < kParts; ++i) sums[v][i] = Floats::all(0.0f);
    }
    for (std::int64_t k = 0; k < steps; ++k) {
        const std::int64_t place = k % kLine;
        if (next != nullptr && place < kCount) fetch(next + place * stride + (k - place));
        Floats from[kParts];
        for (int i = 0; i < kParts; ++i) from[i] = Floats::load(x + k * lanes + i * Floats::kLanes);
        for (int v = 0; v < kCount; ++v) {
            const Floats weight = Floats::all(rows[v * stride + k]);
            for (int i = 0; i < kParts; ++i) sums[v][i].add_product(weight, from[i]);
        }
    }
    for (int v = 0; v < kCount; ++v) {
        for (int i = 0; i < kParts; ++i) sums[v][i].add_to(logits + v * lanes + i * Floats::kLanes);
    }
}

PYEDITFAST_HEAD_TARGET void add_logits(float* logits, const HeadTile& tile, const float* x,
                                       std::int64_t lanes) {
    for (std::int64_t first = 0; first < tile.width; first += kSteps) {
        const std::int64_t steps = std::min(kSteps, tile.width - first);
        for (std::int64_t lane = 0; lane < lanes; lane += kHeadLanes) {
            const float* from = x + first * lanes + lane;
            const float* rows = tile.rows + first;
            float* to = logits + lane;
            std::int64_t v = 0;
            for (; v + kTokens <= tile.tokens; v += kTokens) {
                const float* block = rows + v * tile.stride;
                logits_block<kTokens>(to + v * lanes, block, tile.stride, from, lanes, steps,
                                      lane == 0 ? block + tile.tokens * tile.stride : nullptr);
            }
            for (; v < tile.tokens; ++v) {
                logits_block<1>(to + v * lanes, rows + v * tile.stride, tile.stride, from, lanes,
                                steps, nullptr);
            }
        }
    }
}

// The sums of kCount lanes and kWidth vectors of the tile's columns.
template <int kCount, int kWidth>
PYEDITFAST_HEAD_TARGET void weighted_block(float* sums, std::int64_t width, const HeadTile& tile,
                                           const float* p, std::int64_t lanes) {
    Floats totals[kCount][kWidth];
    for (int r = 0; r < kCount; ++r) {
        for (int i = 0; i < kWidth; ++i) {
            totals[r][i] = Floats::load(sums + r * width + i * Floats::kLanes);
        }
    }
    const float* row = tile.rows;
    for (std::int64_t v = 0; v < tile.tokens; ++v, row += tile.stride, p += lanes) {
        Floats weights[kWidth];
        for (int i = 0; i < kWidth; ++i) weights[i] = Floats::load(row + i * Floats::kLanes);
        for (int r = 0; r < kCount; ++r) {
            const Floats factor = Floats::all(p[r]);
            for (int i = 0; i < kWidth; ++i) totals[r][i].add_product(factor, weights[i]);
        }
    }
    for (int r = 0; r < kCount; ++r) {
        for (int i = 0; i < kWidth; ++i) {
            totals[r][i].store(sums + r * width + i * Floats::kLanes);
        }
    }
}

// The same for `count` lanes, kCount at most.
template <int kCount, int kWidth>
PYEDITFAST_HEAD_TARGET void weighted_lanes(std::int64_t count, float* sums, std::int64_t width,
                                           const HeadTile& tile, const float* p,
                                           std::int64_t lanes) {
    if constexpr (kCount > 1) {
        if (count < kCount) {
            weighted_lanes<kCount - 1, kWidth>(count, sums, width, tile, p, lanes);
            return;
        }
    }
    weighted_block<kCount, kWidth>(sums, width, tile, p, lanes);
}

PYEDITFAST_HEAD_TARGET void add_weighted_tokens(float* sums, const HeadTile& tile, const float* p,
                                                std::int64_t rows, std::int64_t lanes) {
    constexpr std::int64_t kWide = kVectors * Floats::kLanes;
    for (std::int64_t r = 0; r < rows; r += kRows) {
        const std::int64_t count = std::min<std::int64_t>(kRows, rows - r);
        float* to = sums + r * tile.width;
        std::int64_t k = 0;
        for (; k + kWide <= tile.width; k += kWide) {
            const HeadTile strip = {tile.rows + k, tile.stride, tile.tokens, kWide};
            weighted_lanes<kRows, kVectors>(count, to + k, tile.width, strip, p + r, lanes);
        }
        for (; k + Floats::kLanes <= tile.width; k += Floats::kLanes) {
            const HeadTile strip = {tile.rows + k, tile.stride, tile.tokens, Floats::kLanes};
            weighted_lanes<kRows, 1>(count, to + k, tile.width, strip, p + r, lanes);
        }
        for (; k < tile.width; ++k) {
            for (std::int64_t lane = 0; lane < count; ++lane) {
                float& sum = to[lane * tile.width + k];
                for (std::int64_t v = 0; v < tile.tokens; ++v) {
                    sum = std::fma(p[v * lanes + r + lane], tile.rows[v * tile.stride + k], sum);
                }
            }
        }
    }
}
