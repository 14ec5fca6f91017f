#include "block_executor.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulated {
namespace {

constexpr std::size_t kStackBytes = 256 << 10;
constexpr int kNobody = -1;
constexpr int kSeveral = -2;

struct Stop {
    std::string problem;
};

enum class State { kReady, kAtBarrier, kInExchange, kEnded };

struct Fiber {
    ucontext_t context;
    unsigned char* stack;
    State state;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
#endif
};

// Who last touched an element of shared memory in one way, and between which barriers.
struct Touch {
    int thread = kNobody;
    std::int64_t epoch = -1;

    // The thread other than `self` that did so in this epoch, if any.
    int other_than(int self, std::int64_t now) const {
        return epoch == now && thread != self ? thread : kNobody;
    }
    void note(int self, std::int64_t now) {
        thread = epoch == now && thread != self ? kSeveral : self;
        epoch = now;
    }
};

struct Touched {
    Touch read, written, added;
};

struct Warp {
    const char* operation;
    int arrived;
    std::int64_t exchanges;
    // Of this exchange and the one before it, which some lanes may still read.
    unsigned char data[2][kWarpSize * kMostExchanged];
};

struct Executor {
    Place place{}, grid{};
    int count = 0;
    int running = 0;
    int at_barrier = 0;
    std::int64_t epoch = 0;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    std::vector<Touched> touched;
    const std::function<void()>* body = nullptr;
    std::string problem;
    ucontext_t scheduler;
#if defined(__SANITIZE_ADDRESS__)
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    std::size_t scheduler_stack_bytes = 0;
#endif

    void run_block();
    void resume(int number);
    void wait(State state);
    std::string stuck() const;
};

thread_local Executor* executor = nullptr;

std::string name_of(int number) {
    return "thread " + std::to_string(number) + " of block (" +
           std::to_string(executor->place.x) + ", " + std::to_string(executor->place.y) + ", " +
           std::to_string(executor->place.z) + ")";
}

// Returns the stack of a fiber. Stacks are kept for later kernels.
unsigned char* stack_of(int number) {
    thread_local std::vector<std::unique_ptr<unsigned char[]>> stacks;
    while (static_cast<int>(stacks.size()) <= number) {
        stacks.emplace_back(new unsigned char[kStackBytes]);
    }
    return stacks[static_cast<std::size_t>(number)].get();
}

// What a fiber begins with. It never returns: its context has no successor.
void enter() {
    Executor& own = *executor;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &own.scheduler_stack, &own.scheduler_stack_bytes);
#endif
    try {
        (*own.body)();
    } catch (const Stop& stop) {
        own.problem = stop.problem;
    } catch (const std::exception& error) {
        own.problem = name_of(own.running) + ": " + error.what();
    }
    Fiber& fiber = own.fibers[static_cast<std::size_t>(own.running)];
    fiber.state = State::kEnded;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, own.scheduler_stack, own.scheduler_stack_bytes);
#endif
    setcontext(&own.scheduler);
    std::abort();
}

// Not inlined: getcontext returns twice for all that the compiler knows.
__attribute__((noinline)) void prepare(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::kReady;
}

void Executor::resume(int number) {
    running = number;
    Fiber& fiber = fibers[static_cast<std::size_t>(number)];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
    swapcontext(&scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void Executor::wait(State state) {
    Fiber& fiber = fibers[static_cast<std::size_t>(running)];
    fiber.state = state;
    const int number = running;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);
#endif
    swapcontext(&fiber.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
    running = number;
}

// Says why no thread of the block can go on.
std::string Executor::stuck() const {
    int waiting[4] = {};
    int first[4] = {kNobody, kNobody, kNobody, kNobody};
    for (int number = 0; number < count; ++number) {
        const int state = static_cast<int>(fibers[static_cast<std::size_t>(number)].state);
        if (waiting[state]++ == 0) first[state] = number;
    }
    const char* const words[4] = {"ready", "at a barrier", "in an exchange of its warp", "ended"};
    std::string text = "the threads diverge: ";
    for (int state = 1; state < 4; ++state) {
        if (waiting[state] == 0) continue;
        text += std::to_string(waiting[state]) + " " + words[state] + " (first " +
                name_of(first[state]) + "), ";
    }
    return text + "and none can go on";
}

void Executor::run_block() {
    std::fill(shared.begin(), shared.end(), static_cast<unsigned char>(0xFF));
    std::fill(touched.begin(), touched.end(), Touched{});
    for (Warp& warp : warps) warp = Warp{};
    at_barrier = 0;
    epoch = 0;
    for (Fiber& fiber : fibers) prepare(fiber);
    for (int ended = 0; ended < count;) {
        bool progress = false;
        for (int number = 0; number < count; ++number) {
            Fiber& fiber = fibers[static_cast<std::size_t>(number)];
            if (fiber.state != State::kReady) continue;
            progress = true;
            resume(number);
            if (!problem.empty()) return;
            if (fiber.state == State::kEnded) ++ended;
        }
        if (!progress) {
            problem = stuck();
            return;
        }
    }
}

// The number of blocks at or before `most`, in the order that the environment asks for.
std::vector<std::int64_t> order_of_blocks(std::int64_t count) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(count));
    std::iota(order.begin(), order.end(), std::int64_t{0});
    const char* const seed = std::getenv("PYEDITFAST_BLOCK_ORDER");
    std::uint64_t state = seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10);
    if (state == 0) return order;
    for (std::size_t last = order.size(); last > 1; --last) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        std::swap(order[last - 1], order[(state >> 33) % last]);
    }
    return order;
}

}  // namespace

std::string run(Place blocks, int threads, std::size_t shared_bytes,
                const std::function<void()>& body) {
    constexpr std::int64_t kMostX = (std::int64_t{1} << 31) - 1, kMostYZ = 65535;
    if (blocks.x < 1 || blocks.y < 1 || blocks.z < 1 || blocks.x > kMostX || blocks.y > kMostYZ ||
        blocks.z > kMostYZ) {
        return "invalid configuration argument: a grid of " + std::to_string(blocks.x) + " x " +
               std::to_string(blocks.y) + " x " + std::to_string(blocks.z) + " blocks";
    }
    if (threads < 1 || threads > 1024) {
        return "invalid configuration argument: blocks of " + std::to_string(threads) + " threads";
    }
    if (shared_bytes > kMostShared) {
        return "invalid configuration argument: " + std::to_string(shared_bytes) +
               " bytes of shared memory a block";
    }
    Executor own;
    own.grid = blocks;
    own.count = threads;
    own.body = &body;
    own.fibers.resize(static_cast<std::size_t>(threads));
    for (int number = 0; number < threads; ++number) {
        own.fibers[static_cast<std::size_t>(number)].stack = stack_of(number);
    }
    own.warps.resize(static_cast<std::size_t>((threads + kWarpSize - 1) / kWarpSize));
    own.shared.resize(shared_bytes);
    own.touched.resize(shared_bytes);
    Executor* const outer = executor;
    executor = &own;
    for (const std::int64_t number : order_of_blocks(blocks.x * blocks.y * blocks.z)) {
        own.place = {number % blocks.x, number / blocks.x % blocks.y,
                     number / blocks.x / blocks.y};
        own.run_block();
        if (!own.problem.empty()) break;
    }
    executor = outer;
    return own.problem;
}

int thread() { return executor->running; }
int threads() { return executor->count; }
Place block() { return executor->place; }
Place blocks() { return executor->grid; }
std::size_t shared_bytes() { return executor->shared.size(); }

void fail(const std::string& problem) {
    throw Stop{name_of(executor->running) + ": " + problem};
}

void barrier() {
    Executor& own = *executor;
    if (++own.at_barrier < own.count) {
        own.wait(State::kAtBarrier);
        return;
    }
    own.at_barrier = 0;
    ++own.epoch;
    for (Fiber& fiber : own.fibers) {
        if (fiber.state == State::kAtBarrier) fiber.state = State::kReady;
    }
}

const unsigned char* exchange(const char* operation, const void* data, std::size_t size) {
    Executor& own = *executor;
    if (own.count % kWarpSize != 0) fail("an exchange in a block with a part of a warp");
    if (size > kMostExchanged) fail("an exchange of too many bytes");
    const int lane = own.running % kWarpSize, first = own.running - lane;
    Warp& warp = own.warps[static_cast<std::size_t>(own.running / kWarpSize)];
    if (warp.arrived == 0) warp.operation = operation;
    if (std::strcmp(warp.operation, operation) != 0) {
        fail(std::string("it is at ") + operation + ", others of its warp at " + warp.operation);
    }
    unsigned char* const slots = warp.data[warp.exchanges % 2];
    std::memcpy(slots + static_cast<std::size_t>(lane) * kMostExchanged, data, size);
    if (++warp.arrived < kWarpSize) {
        own.wait(State::kInExchange);
        return slots;
    }
    warp.arrived = 0;
    ++warp.exchanges;
    for (int other = 0; other < kWarpSize; ++other) {
        Fiber& fiber = own.fibers[static_cast<std::size_t>(first + other)];
        if (fiber.state == State::kInExchange) fiber.state = State::kReady;
    }
    return slots;
}

void* shared_element(std::size_t offset, std::size_t size, Access access) {
    Executor& own = *executor;
    if (offset + size > own.shared.size()) fail("shared memory out of bounds");
    Touched& touched = own.touched[offset];
    const int self = own.running;
    const auto no_race = [&](const char* what, const Touch& touch) {
        const int other = touch.other_than(self, own.epoch);
        if (other == kNobody) return;
        fail(std::string("a race: it ") + what + " shared byte " + std::to_string(offset) +
             ", which " + (other == kSeveral ? "others touch" : "thread " + std::to_string(other) +
             " touches") + " between the same barriers");
    };
    const bool known = touched.written.thread != kNobody;
    switch (access) {
        case Access::kRead:
            if (!known) fail("it reads shared memory that nobody wrote");
            no_race("reads", touched.written);
            no_race("reads", touched.added);
            touched.read.note(self, own.epoch);
            break;
        case Access::kWrite:
            no_race("writes", touched.read);
            no_race("writes", touched.written);
            no_race("writes", touched.added);
            touched.written.note(self, own.epoch);
            break;
        case Access::kAtomic:
            if (!known) fail("it adds to shared memory that nobody wrote");
            no_race("adds to", touched.read);
            no_race("adds to", touched.written);
            touched.added.note(self, own.epoch);
            break;
    }
    return own.shared.data() + offset;
}

}  // namespace emulated
