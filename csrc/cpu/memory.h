// Working memory of the kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "gemm.h"

namespace leedl {

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], FreeDeleter>;

// Aligned to a cache line, not initialised. Allocated before a parallel region: exceptions must not leave one.
template <typename T>
Buffer<T> allocate(int64_t count) {
  const size_t bytes = static_cast<size_t>(round_up(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)), 64));
  T* p = static_cast<T*>(std::aligned_alloc(64, bytes));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer<T>(p);
}

// Hands out the parts of one allocation, each aligned to a cache line. Without memory (null) it only counts.
class ByteArena {
 public:
  explicit ByteArena(std::byte* base) : base_(base) {}
  template <typename T>
  void take(T*& part, int64_t count) {
    part = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + taken_);
    taken_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
  }
  int64_t taken() const { return taken_; }

 private:
  std::byte* base_;
  int64_t taken_ = 0;
};

}  // namespace leedl
