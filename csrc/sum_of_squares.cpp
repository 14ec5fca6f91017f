#include "sum_of_squares.h"

#include "vector_clones.h"

namespace pyeditfast {
namespace {

constexpr std::int64_t kLanes = 16;

// sums[lane] = the squares of every 16th value from `lane` on.
PYEDITFAST_VECTOR_CLONES
void sum_lanes(float* __restrict sums, const float* __restrict values, std::int64_t count) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) sums[lane] = 0.0f;
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
            sums[lane] += values[i + lane] * values[i + lane];
        }
    }
    for (std::int64_t lane = 0; i + lane < count; ++lane) {
        sums[lane] += values[i + lane] * values[i + lane];
    }
}

}  // namespace

double sum_of_squares(const float* values, std::int64_t count) {
    float sums[kLanes];
    sum_lanes(sums, values, count);
    double total = 0.0;
    for (std::int64_t lane = 0; lane < kLanes; ++lane) total += static_cast<double>(sums[lane]);
    return total;
}

}  // namespace pyeditfast
