// Splits an index range over threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "team.h"

namespace pyeditfast {

// How many threads `parallel_ranges` uses: no thread gets less than one grain.
inline int worker_count(std::int64_t count, int threads, std::int64_t grain) {
    const std::int64_t grains = count / grain + (count % grain != 0);
    return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, grains)));
}

// Calls body(worker, begin, end) once for each worker in [0, worker_count), for disjoint ranges
// that cover [0, count), on up to `threads` threads, the caller's among them. Ranges start at
// multiples of `grain`: waking a thread costs more than a small range. The body must not throw.
template <typename Body>
inline void parallel_ranges(std::int64_t count, int threads, std::int64_t grain,
                            const Body& body) {
    if (count <= 0) return;
    const int workers = worker_count(count, threads, grain);
    const std::int64_t grains = count / grain + (count % grain != 0);
    const std::int64_t share = grains / workers;
    const std::int64_t remainder = grains % workers;
    const auto begin_of = [=](std::int64_t worker) {
        const std::int64_t first = worker * share + std::min(worker, remainder);
        return first >= grains ? count : first * grain;
    };
    const auto work = [&](int worker) { body(worker, begin_of(worker), begin_of(worker + 1)); };
    run_team(workers, threads, work);
}

}  // namespace pyeditfast
