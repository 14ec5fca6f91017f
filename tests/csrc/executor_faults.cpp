// Kernels with one fault each, by name, and some without: what the block executor says of them.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "device.h"

namespace {

using namespace pyeditfast::device;

constexpr int kThreads = 64;

KERNEL void sums_over_all_threads(float* out) {
    SharedMemory memory;
    const Shared<float> values = memory.take<float>(kThreads);
    values[thread()] = static_cast<float>(thread());
    barrier();
    float total = 0.0f;
    for (int i = 0; i < kThreads; ++i) total += values[i];
    const float of_warp = warp_sum(values[thread()]);
    barrier();
    values[thread()] = total;
    if (ballot(thread() % 2 == 1) != 0xAAAAAAAAu) emulated::fail("a wrong ballot");
    out[block_x() * kThreads + thread()] = total + of_warp;
}

KERNEL void counts(std::uint32_t* out) {
    SharedMemory memory;
    const Shared<std::uint32_t> count = memory.take<std::uint32_t>(1);
    if (thread() == 0) count[0] = 0u;
    barrier();
    atomic_add(count, 0, 1u);
    barrier();
    if (thread() == 0) atomic_add(out, std::uint32_t(count[0]));
}

KERNEL void out_of_bounds(float*) {
    SharedMemory memory;
    const Shared<float> values = memory.take<float>(kThreads);
    values[thread() + 1] = 1.0f;
}

KERNEL void negative_index(float*) {
    SharedMemory memory;
    const Shared<float> values = memory.take<float>(kThreads);
    (values + 3)[thread() - 4] = 1.0f;
}

KERNEL void takes_too_much(float*) {
    SharedMemory memory;
    memory.take<float>(kThreads);
    memory.take<double>(kThreads);
    memory.take<float>(1);
}

KERNEL void reads_before_the_barrier(float* out) {
    SharedMemory memory;
    const Shared<float> values = memory.take<float>(kThreads);
    values[thread()] = 1.0f;
    out[thread()] = values[thread() ^ 1];
}

KERNEL void writes_what_others_still_read(float* out) {
    SharedMemory memory;
    const Shared<float> values = memory.take<float>(kThreads);
    values[thread()] = 1.0f;
    barrier();
    out[thread()] = values[(thread() + 1) % kThreads];
    values[thread()] = 2.0f;
}

KERNEL void writes_twice(float*) {
    SharedMemory memory;
    const Shared<float> values = memory.take<float>(1);
    values[0] = 1.0f;
}

KERNEL void adds_while_others_write(float*) {
    SharedMemory memory;
    const Shared<std::uint32_t> count = memory.take<std::uint32_t>(1);
    if (thread() == 0) count[0] = 0u;
    atomic_add(count, 0, 1u);
}

KERNEL void reads_what_nobody_wrote(float* out) {
    SharedMemory memory;
    const Shared<float> values = memory.take<float>(kThreads);
    if (thread() != 5) values[thread()] = 1.0f;
    barrier();
    out[thread()] = values[thread()];
}

KERNEL void some_skip_the_barrier(float*) {
    if (thread() % 3 != 0) barrier();
}

KERNEL void some_wait_once_more(float*) {
    barrier();
    if (thread() < 32) barrier();
}

KERNEL void lanes_skip_a_shuffle(float* out) {
    if (lane() < 7) out[thread()] = shuffle_xor(1.0f, 1);
}

KERNEL void lanes_at_different_operations(float* out) {
    if (lane() < 7) {
        out[thread()] = shuffle_xor(1.0f, 1);
    } else {
        out[thread()] = static_cast<float>(ballot(true));
    }
}

KERNEL void misaligned_load(float* out) {
    out[0] = float_of(load_16_bytes(out + 1).at[0]);
}

template <typename Kernel, typename... Arguments>
void report(Kernel kernel, std::size_t shared_bytes, Arguments... arguments) {
    char message[300] = "";
    launch("the kernel", "2 blocks", kernel, Grid{2}, kThreads, shared_bytes, pyeditfast_stream{},
           {message, sizeof message}, arguments...);
    std::puts(message[0] == '\0' ? "passed" : message);
}

}  // namespace

int main(int count, char** arguments) {
    const std::string name = count == 2 ? arguments[1] : "";
    alignas(16) static float out[2 * kThreads];
    constexpr std::size_t kFloats = kThreads * sizeof(float);
#define RUN(kernel, bytes) \
    if (name == #kernel) return report(kernel, bytes, out), 0
    if (name == "sums_over_all_threads") {
        report(sums_over_all_threads, kFloats, out);
        for (int i = 0; i < 2 * kThreads; ++i) {
            const float of_warp = i % kThreads < 32 ? 496.0f : 1520.0f;
            if (out[i] != 2016.0f + of_warp) return std::puts("a wrong sum"), 1;
        }
        return 0;
    }
    if (name == "counts") {
        std::uint32_t counted = 0;
        report(counts, 16, &counted);
        return counted == 2 * kThreads ? 0 : (std::puts("a wrong count"), 1);
    }
    RUN(out_of_bounds, kFloats);
    RUN(negative_index, kFloats);
    RUN(takes_too_much, 3 * kFloats);
    RUN(reads_before_the_barrier, kFloats);
    RUN(writes_what_others_still_read, kFloats);
    RUN(writes_twice, 16);
    RUN(adds_while_others_write, 16);
    RUN(reads_what_nobody_wrote, kFloats);
    RUN(some_skip_the_barrier, 0);
    RUN(some_wait_once_more, 0);
    RUN(lanes_skip_a_shuffle, 0);
    RUN(lanes_at_different_operations, 0);
    RUN(misaligned_load, 0);
    if (name == "asks_for_too_much") return report(out_of_bounds, 100 << 10, out), 0;
    std::puts("no such kernel");
    return 1;
}
