// Sums of squares whose order of additions is the same on every machine.
#pragma once

#include <cstdint>

#include "vector_clones.h"

namespace pyeditfast {

// Value i counts in lane i % kLanes.
constexpr std::int64_t kLanes = 16;

// lanes[lane] = the squares of value(i) for every i in [0, count) of that lane.
template <typename Value>
PYEDITFAST_INLINE void square_lanes(float* __restrict lanes, std::int64_t count,
                                    const Value& value) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = 0.0f;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
            const float each = value(i + lane);
            lanes[lane] += each * each;
        }
    }
    for (std::int64_t lane = 0; i + lane < count; ++lane) {
        const float each = value(i + lane);
        lanes[lane] += each * each;
    }
}

inline double sum_of_lanes(const float* lanes) {
    double total = 0.0;
    for (std::int64_t lane = 0; lane < kLanes; ++lane) total += static_cast<double>(lanes[lane]);
    return total;
}

}  // namespace pyeditfast
