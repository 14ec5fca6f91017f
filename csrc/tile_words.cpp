#include "tile_words.h"

#include <algorithm>

#include "philox_words.h"

namespace pyeditfast {

// Fetched all at once, more cache lines than a processor waits for at a time would hold up the
// words behind them too.
constexpr std::int64_t kPart = 128;

void tile_words(std::uint32_t* out, const Walk& walk, const Tile& tile, std::int64_t offset,
                std::uint64_t seed, std::initializer_list<Lines> matrices) {
    for (std::int64_t first = 0; first < tile.count; first += kPart) {
        const std::int64_t count = std::min(kPart, tile.count - first);
        const Tile part = {tile.line, tile.begin + first, count};
        for (const Lines& lines : matrices) prefetch_tile(lines, part);
        philox_words(out + first, count,
                     static_cast<std::uint64_t>(offset + walk.first_index(part)),
                     static_cast<std::uint64_t>(walk.index_step()), seed);
    }
}

}  // namespace pyeditfast
