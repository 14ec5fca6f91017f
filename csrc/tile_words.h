// Random words for the elements of a tile.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "tiles.h"

namespace pyeditfast {

// out[i] = the Philox word of the tile's element i: that of its row-major index plus `offset` in the
// stream of `seed` (philox_words.h). Meanwhile the tiles of `matrices` are fetched into the cache, which
// takes as long as the words where memory is slow.
void tile_words(std::uint32_t* out, const Walk& walk, const Tile& tile, std::int64_t offset,
                std::uint64_t seed, std::initializer_list<Lines> matrices);

}  // namespace pyeditfast
