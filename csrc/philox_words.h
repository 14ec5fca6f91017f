// Many Philox words at once, with the widest vectors of the machine.
#pragma once

#include <cstdint>

namespace pyeditfast {

// out[i] = the first word of the block for counter `start + i * step` (64 bits, wrapping) and key
// `seed`, for i in [0, count). philox.h has the equation; all instruction sets give the same bits.
void philox_words(std::uint32_t* out, std::int64_t count, std::uint64_t start, std::uint64_t step,
                  std::uint64_t seed);

}  // namespace pyeditfast
