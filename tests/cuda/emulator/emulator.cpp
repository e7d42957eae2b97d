#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

Index thread_index, block_index, block_size, grid_size;
unsigned lane;
unsigned char* shared_memory;

namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr int kPoison = 0xFF;  // NaN as a number of any dtype

enum class State { kReady, kAtBlockBarrier, kInExchange, kDone };

// What the lanes of one exchange have handed in, for as long as one of them may read it.
struct Exchange {
  alignas(64) unsigned char bytes[kWarpSize * kMostBytesExchanged];
  int readers = 0;
};

struct Fiber {
  ucontext_t context = {};
  jmp_buf place;  // where it waits
  std::unique_ptr<unsigned char[]> stack;
  bool has_begun = false;
  State state;
  Index index;
  // The exchange that it waits in.
  const char* instruction;
  uint32_t mask;
  const void* mine;
  size_t bytes;
  Exchange* exchange = nullptr;  // whose bytes it may still read
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::vector<int>> ready;  // of each warp
  std::vector<int> warps;               // in the order in which they race
  bool is_race;
  int size, live, at_barrier;
  std::vector<std::unique_ptr<Exchange>> exchanges;
};

Block block;
Fiber* running;
jmp_buf scheduler;
ucontext_t host;
const std::function<void()>* body;
std::mt19937_64 orders;
std::mutex one_grid;

// Saves the running fiber's place, and goes on with the scheduler.
void yield() {
  if (_setjmp(running->place) == 0) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*body)();
    running->state = State::kDone;
    yield();
  }
}

void resume(Fiber* fiber) {
  running = fiber;
  thread_index = fiber->index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber->has_begun) _longjmp(fiber->place, 1);
  fiber->has_begun = true;
  swapcontext(&host, &fiber->context);
}

Fiber& fiber_at(int i) {
  while (static_cast<int>(block.fibers.size()) <= i) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = std::make_unique<unsigned char[]>(kStackBytes);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber->context, fiber_main, 0);
    block.fibers.push_back(std::move(fiber));
  }
  return *block.fibers[i];
}

void make_ready(int i) {
  block.fibers[i]->state = State::kReady;
  block.ready[i / kWarpSize].push_back(i);
}

// The next thread to run, or -1. In one half of the blocks the warps keep abreast; in the other half some run as far
// ahead as they can, until the order is drawn again.
int take_ready() {
  constexpr int kStepsOfAnOrder = 256;  // on average
  if (!block.is_race || orders() % kStepsOfAnOrder == 0) std::shuffle(block.warps.begin(), block.warps.end(), orders);
  for (const int warp : block.warps) {
    std::vector<int>& ready = block.ready[warp];
    if (ready.empty()) continue;
    std::swap(ready[orders() % ready.size()], ready.back());
    const int i = ready.back();
    ready.pop_back();
    return i;
  }
  return -1;
}

// As on the device, threads that have ended are not waited for.
void open_block_barrier() {
  if (block.live == 0 || block.at_barrier < block.live) return;
  block.at_barrier = 0;
  for (int i = 0; i < block.size; ++i) {
    if (block.fibers[i]->state == State::kAtBlockBarrier) make_ready(i);
  }
}

Exchange* free_exchange() {
  for (const auto& exchange : block.exchanges) {
    if (exchange->readers == 0) return exchange.get();
  }
  block.exchanges.push_back(std::make_unique<Exchange>());
  return block.exchanges.back().get();
}

void release(Fiber& fiber) {
  if (fiber.exchange != nullptr) --fiber.exchange->readers;
  fiber.exchange = nullptr;
}

// Where every lane that `fiber` waits for has arrived, hands all of them what they exchange.
void complete_exchange(int first_of_warp, const Fiber& fiber) {
  const auto is_waited_for = [&](int i) { return (fiber.mask >> i & 1) != 0; };
  for (int i = 0; i < kWarpSize; ++i) {
    if (!is_waited_for(i)) continue;
    if (first_of_warp + i >= block.size) throw std::runtime_error("a mask names lanes that the block does not have");
    const Fiber& other = *block.fibers[first_of_warp + i];
    if (other.state != State::kInExchange || other.mask != fiber.mask) return;
    if (std::strcmp(other.instruction, fiber.instruction) != 0) {
      throw std::runtime_error(std::string("lanes of a warp wait at different instructions: ") + fiber.instruction +
                               " and " + other.instruction);
    }
  }
  Exchange* const exchange = free_exchange();
  std::memset(exchange->bytes, kPoison, sizeof(exchange->bytes));
  for (int i = 0; i < kWarpSize; ++i) {
    if (!is_waited_for(i)) continue;
    Fiber& other = *block.fibers[first_of_warp + i];
    std::memcpy(exchange->bytes + i * other.bytes, other.mine, other.bytes);
    other.exchange = exchange;
    ++exchange->readers;
    make_ready(first_of_warp + i);
  }
}

void run_block() {
  block.live = block.size;
  block.at_barrier = 0;
  block.is_race = orders() % 2 == 0;
  const int warps = (block.size + kWarpSize - 1) / kWarpSize;
  block.ready.assign(warps, {});
  block.warps.resize(warps);
  std::iota(block.warps.begin(), block.warps.end(), 0);
  std::shuffle(block.warps.begin(), block.warps.end(), orders);
  for (int i = 0; i < block.size; ++i) make_ready(i);
  for (int i = take_ready(); i >= 0; i = take_ready()) {
    Fiber& fiber = *block.fibers[i];
    lane = i % kWarpSize;
    resume(&fiber);
    switch (fiber.state) {
      case State::kDone:
        release(fiber);
        --block.live;
        open_block_barrier();
        break;
      case State::kAtBlockBarrier:
        ++block.at_barrier;
        open_block_barrier();
        break;
      default:
        complete_exchange(i - i % kWarpSize, fiber);
    }
  }
  if (block.live == 0) return;
  for (int i = 0; i < block.size; ++i) {
    if (block.fibers[i]->state == State::kInExchange) {
      throw std::runtime_error(std::string("a warp waits for lanes that never come, at ") +
                               block.fibers[i]->instruction);
    }
  }
  throw std::runtime_error("a block waits at a barrier for threads that never come");
}

}  // namespace

void run_grid(Index grid, Index block_shape, size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_grid);
  grid_size = grid;
  block_size = block_shape;
  block.size = block_shape.x * block_shape.y * block_shape.z;
  body = &kernel;
  std::vector<size_t> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), size_t{0});
  std::shuffle(blocks.begin(), blocks.end(), orders);
  try {
    for (const size_t number : blocks) {
      block_index = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                     static_cast<unsigned>(number / grid.x / grid.y)};
      for (int i = 0; i < block.size; ++i) {
        Fiber& fiber = fiber_at(i);
        fiber.index = {i % block_shape.x, i / block_shape.x % block_shape.y, i / block_shape.x / block_shape.y};
      }
      // As long as the launch asked for, so that a sanitizer sees what goes beyond.
      const std::unique_ptr<unsigned char, decltype(&std::free)> memory(
          static_cast<unsigned char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128)), &std::free);
      shared_memory = memory.get();
      std::memset(shared_memory, kPoison, shared_bytes);
      run_block();
    }
  } catch (...) {
    block = Block();  // its threads are in the middle of the kernel
    throw;
  }
}

void set_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(one_grid);
  orders.seed(seed);
}

void wait_for_block() {
  running->state = State::kAtBlockBarrier;
  yield();
}

void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  std::fprintf(stderr, "an access of %zu bytes at %p\n", bytes, address);
  std::abort();
}

const void* exchange_bytes(const char* instruction, uint32_t mask, const void* mine, size_t bytes) {
  Fiber& fiber = *running;
  release(fiber);
  fiber.instruction = instruction;
  fiber.mask = mask;
  fiber.mine = mine;
  fiber.bytes = bytes;
  fiber.state = State::kInExchange;
  yield();
  return fiber.exchange->bytes;
}

}  // namespace emulator
