// Runs a kernel's threads as fibers of one thread of the host: blocks one after another, and the threads of a block in
// a random order, each as far as its next barrier or exchange; in every other block some warps run far ahead of others.
//
// A thread that reads shared memory too early finds NaN there, and one that writes too early changes what others are
// yet to read. What no order of threads can bring on is reported: barriers that not all threads reach, and lanes that
// wait for each other at different instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

struct Index {
  unsigned x, y, z;
};

constexpr int kWarpSize = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kMostBytesExchanged = 64;

// Of the thread that is running.
extern Index thread_index, block_index, block_size, grid_size;
extern unsigned lane;
extern unsigned char* shared_memory;

// Throws std::runtime_error where the kernel waits for ever.
void run_grid(Index grid, Index block, size_t shared_bytes, const std::function<void()>& kernel);

// Seeds the orders from now on; 0, the default, is one like any other.
void set_seed(uint64_t seed);

void wait_for_block();

// Ends the process where `address` is no multiple of `bytes`, as a GPU ends the kernel.
void check_alignment(const void* address, size_t bytes);

// Waits for the lanes of `mask`, each of which hands in `bytes` at `mine`; the bytes of lane i are at [i * bytes] of what
// it returns, until the thread's next exchange. `instruction`: all of them must be at the same one.
const void* exchange_bytes(const char* instruction, uint32_t mask, const void* mine, size_t bytes);

template <typename T>
const T* exchange(const char* instruction, uint32_t mask, const T& mine) {
  static_assert(sizeof(T) <= kMostBytesExchanged);
  return static_cast<const T*>(exchange_bytes(instruction, mask, &mine, sizeof(T)));
}

}  // namespace emulator
