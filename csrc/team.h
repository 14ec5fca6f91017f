// Threads that work together: those of torch where it lends them, else new ones for each call.
//
// torch's idle threads keep their processors busy for a while, waiting for more work, and a thread
// started beside them waits for a processor.
#pragma once

#include <cstdint>

namespace pyeditfast {

// What GCC's OpenMP calls to run body(data) on `threads` threads, the caller's among them.
using StartTeam = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// Takes the threads of an OpenMP runtime from now on, but not in processes forked later; null: new
// ones for each call, as at first.
void share_threads(StartTeam start);

// Calls work(context, worker) once for each worker in [0, workers), on up to `threads` threads,
// the caller's among them, and returns when all are done. A machine that refuses a thread makes
// this slower, not wrong. Nothing may throw.
void run_team(int workers, int threads, void (*work)(const void* context, int worker),
              const void* context);

template <typename Work>
inline void run_team(int workers, int threads, const Work& work) {
    run_team(
        workers, threads,
        [](const void* context, int worker) { (*static_cast<const Work*>(context))(worker); },
        &work);
}

}  // namespace pyeditfast
