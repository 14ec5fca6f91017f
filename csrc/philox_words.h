// Many Philox words at once, with the widest vectors of the machine.
#pragma once

#include <cstdint>

namespace pyeditfast {

// out[i] = the word of element j = start + i * step of the stream that `seed` names, for i in
// [0, count): word j mod 4 of the block whose counter is j div 4. All j are below 2^64. philox.h has
// the equation; all instruction sets give the same bits. Elements side by side share their blocks;
// with another step each costs a block.
void philox_words(std::uint32_t* out, std::int64_t count, std::uint64_t start, std::uint64_t step,
                  std::uint64_t seed);

}  // namespace pyeditfast
