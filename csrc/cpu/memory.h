// Working memory of the kernels.
#pragma once

#include <algorithm>
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
template <typename T>
class Arena {
 public:
  explicit Arena(T* base) : base_(base) {}
  T* take(int64_t count) {
    T* part = base_ == nullptr ? nullptr : base_ + taken_;
    taken_ += round_up(count, 64 / static_cast<int64_t>(sizeof(T)));
    return part;
  }
  int64_t taken() const { return taken_; }

 private:
  T* base_;
  int64_t taken_ = 0;
};

}  // namespace leedl
