// Splits an index range over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "status.h"

namespace pyeditfast {

// Calls body(begin, end) for disjoint ranges that cover [0, count), on at most `threads` threads,
// the caller's among them. Ranges start at multiples of `grain`, and no thread gets less than one
// grain: starting a thread costs more than a small range. The body must not throw.
template <typename Body>
inline int parallel_ranges(std::int64_t count, int threads, std::int64_t grain, const Body& body,
                           char* message, std::size_t message_size) {
    const std::int64_t grains = (count + grain - 1) / grain;
    const std::int64_t workers = std::min<std::int64_t>(threads, grains);
    if (workers <= 1) {
        if (count > 0) body(std::int64_t{0}, count);
        return kOk;
    }

    const std::int64_t share = grains / workers;
    const std::int64_t remainder = grains % workers;
    const auto begin_of = [=](std::int64_t worker) {
        return std::min(count, (worker * share + std::min(worker, remainder)) * grain);
    };

    int status = kOk;
    std::vector<std::thread> started;
    try {
        started.reserve(static_cast<std::size_t>(workers - 1));
        for (std::int64_t worker = 1; worker < workers; ++worker) {
            const std::int64_t begin = begin_of(worker);
            const std::int64_t end = begin_of(worker + 1);
            started.emplace_back([&body, begin, end] { body(begin, end); });
        }
        body(std::int64_t{0}, begin_of(1));
    } catch (const std::exception& error) {
        status = fail(kSystemError, message, message_size, "could not start thread %lld of %lld: %s",
                      static_cast<long long>(started.size()) + 2, static_cast<long long>(workers),
                      error.what());
    }
    for (std::thread& thread : started) thread.join();
    return status;
}

}  // namespace pyeditfast
