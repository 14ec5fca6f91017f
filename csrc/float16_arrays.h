// Many float16 numbers at once, by the processor's own conversion where it has one.
#pragma once

#include <cstdint>

namespace pyeditfast {

// out[i] = in[i] for i in [0, count).
void widen_float16(float* out, const std::uint16_t* in, std::int64_t count);

// out[i] = in[i], rounded to nearest even.
void narrow_to_float16(std::uint16_t* out, const float* in, std::int64_t count);

}  // namespace pyeditfast
