// Runs the blocks of a kernel on the CPU, one after the other, the threads of a block as fibers.
//
// A fiber runs until it waits for others: at a barrier of the block, or at an exchange within its
// warp. Every wrong use is an error that names the block and the thread: a barrier or an exchange
// that some threads never reach, shared memory out of bounds, read before it was written, or
// touched by two threads without a barrier between them, a misaligned load.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emulated {

constexpr int kWarpSize = 32;
constexpr std::size_t kMostShared = 99 << 10;  // The least that a chip from sm_80 on has a block.
constexpr std::size_t kMostExchanged = 32;

struct Place {
    std::int64_t x, y, z;
};

// Runs `body` for every thread of `blocks` blocks and returns what went wrong first, or "".
// Blocks run in ascending order, or in another one for every number in the environment variable
// PYEDITFAST_BLOCK_ORDER.
std::string run(Place blocks, int threads, std::size_t shared_bytes,
                const std::function<void()>& body);

// What follows is called by the threads of a kernel.

int thread();
int threads();
Place block();
Place blocks();

void barrier();

// Gives the warp `size` bytes of the calling thread and returns those of all 32, in the order of
// lanes, `kMostExchanged` bytes apart. `operation` has to be the same for all.
const unsigned char* exchange(const char* operation, const void* data, std::size_t size);

// Stops the kernel with an error.
[[noreturn]] void fail(const std::string& problem);

std::size_t shared_bytes();

enum class Access { kRead, kWrite, kAtomic };

// Notes an access to the element at `offset` of the block's shared memory and returns its address.
void* shared_element(std::size_t offset, std::size_t size, Access access);

}  // namespace emulated
