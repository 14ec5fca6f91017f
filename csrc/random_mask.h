// Uniform numbers and masks that are functions of (seed, element), see pyeditfast/ops/random_mask.py.
//
// `out` holds `numel` values; element i is number `offset + i` of the stream of `seed`. The result
// does not depend on `threads`. Returns a Status; on failure `message` says why and `out` is
// unspecified.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

int pyeditfast_random_uniform(float* out, std::int64_t numel, std::uint64_t seed,
                              std::int64_t offset, int threads, char* message,
                              std::size_t message_size);

// out[i] = 1 where uniform number i is below `ratio`, else 0.
int pyeditfast_random_mask(std::uint8_t* out, std::int64_t numel, std::uint64_t seed, float ratio,
                           std::int64_t offset, int threads, char* message,
                           std::size_t message_size);

}  // extern "C"
