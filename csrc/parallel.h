// Splits an index range over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace pyeditfast {

// How many threads `parallel_ranges` uses: no thread gets less than one grain.
inline int worker_count(std::int64_t count, int threads, std::int64_t grain) {
    const std::int64_t grains = count / grain + (count % grain != 0);
    return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(threads, grains)));
}

// Calls body(worker, begin, end) once for each worker in [0, worker_count), for disjoint ranges
// that cover [0, count), each on a thread of its own, the caller's among them. Ranges start at
// multiples of `grain`: starting a thread costs more than a small range. A machine that refuses a
// thread makes this slower, not wrong: the caller does what is left. The body must not throw.
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

    std::vector<std::thread> started;
    int next = 1;
    try {
        started.reserve(static_cast<std::size_t>(workers - 1));
        for (; next < workers; ++next) {
            const std::int64_t begin = begin_of(next);
            const std::int64_t end = begin_of(next + 1);
            started.emplace_back([&body, worker = next, begin, end] { body(worker, begin, end); });
        }
    } catch (const std::exception&) {
        // No thread or no memory for one.
    }
    body(0, std::int64_t{0}, begin_of(1));
    for (; next < workers; ++next) body(next, begin_of(next), begin_of(next + 1));
    for (std::thread& thread : started) thread.join();
}

}  // namespace pyeditfast
