// Large outputs in large pages.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace leedl {

// Asks for large pages under an output that is about to be written. A large tensor is fresh memory at each allocation,
// and writing it for the first time costs more in page faults of 4 KiB than a kernel like add_layer_norm costs itself.
// Only whole 2 MiB pages inside the output are touched; memory in use already stays as it is.
inline void advise_huge_pages(void* output, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 2 << 20;
  const auto address = reinterpret_cast<std::uintptr_t>(output);
  const std::uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  // Only advice: where the system declines it, nothing but speed is lost.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(output);
  static_cast<void>(bytes);
#endif
}

}  // namespace leedl
