// Sums of squares whose order of additions is the same on every machine.
#pragma once

#include <cstdint>

#include "tiles.h"

namespace pyeditfast {

// Returns the sum of the squares of up to kTile values.
double sum_of_squares(const float* values, std::int64_t count);

}  // namespace pyeditfast
