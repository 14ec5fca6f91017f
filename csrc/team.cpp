#include "team.h"

#include <atomic>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace {

std::atomic<pyeditfast::StartTeam> shared{nullptr};

struct Team {
    void (*work)(const void* context, int worker);
    const void* context;
    int workers;
    // A runtime may give fewer threads than were asked for: whoever is free takes the next worker.
    std::atomic<int> next{0};

    void run() {
        for (int worker = next++; worker < workers; worker = next++) work(context, worker);
    }
};

void run_own_threads(Team& team) {
    std::vector<std::thread> started;
    try {
        started.reserve(static_cast<std::size_t>(team.workers - 1));
        for (int number = 1; number < team.workers; ++number) {
            started.emplace_back([&team] { team.run(); });
        }
    } catch (const std::exception&) {
        // No thread or no memory for one.
    }
    team.run();
    for (std::thread& thread : started) thread.join();
}

}  // namespace

void pyeditfast::share_threads(StartTeam start) {
#if defined(__unix__) || defined(__APPLE__)
    // A forked process has no threads but still the runtime that waits for them.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { shared = nullptr; });
    if (registered != 0) return;
#endif
    shared = start;
}

void pyeditfast::run_team(int workers, int threads, void (*work)(const void* context, int worker),
                          const void* context) {
    Team team{work, context, workers};
    const StartTeam start = shared;
    if (workers <= 1) {
        team.run();
    } else if (start == nullptr) {
        run_own_threads(team);
    } else {
        // Always the whole team: a runtime ends the threads that a smaller one does not need.
        start([](void* data) { static_cast<Team*>(data)->run(); }, &team,
              static_cast<unsigned>(threads), 0);
    }
}
