#include "amx.h"

#include <atomic>
#include <stdexcept>

#if defined(__AVX512F__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace leedl {

#if defined(__AVX512F__)

namespace {

#if defined(__linux__)

// CPUID.(7, 0).EDX has AMX-BF16 in bit 22 and AMX-TILE in bit 24; XCR0 says in bits 17 and 18 that the system saves the
// tiles; and Linux makes room for them only for a process that asks.
bool enable_amx() {
  constexpr unsigned kOsxsave = 1u << 27, kAmx = (1u << 22) | (1u << 24), kTileState = (1u << 17) | (1u << 18);
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsxsave) == 0) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmx) != kAmx) return false;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#else

bool enable_amx() { return false; }

#endif

std::atomic<bool>& amx_in_use() {
  static std::atomic<bool> in_use{enable_amx()};
  return in_use;
}

// Assembly, like the other products of pairs: this module is compiled for processors without these instructions too.

template <int kTile>
inline __attribute__((always_inline)) void load(const void* rows, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1), %%tmm%c2" : : "r"(rows), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kTile>
inline __attribute__((always_inline)) void store(void* rows, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1)" : : "r"(rows), "r"(stride_bytes), "i"(kTile) : "memory");
}

template <int kTile>
inline __attribute__((always_inline)) void zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

template <int kC, int kA, int kB>
inline __attribute__((always_inline)) void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

template <int... kIndex, typename Body>
inline __attribute__((always_inline)) void for_each(std::integer_sequence<int, kIndex...>, const Body& body) {
  (body(std::integral_constant<int, kIndex>()), ...);
}

// kRows x kColumns tiles of C. The first four registers hold them, the next kRows A; the columns of B take turns in the
// rest.
template <int kRows, int kColumns>
void multiply_block(int64_t depth, AmxRows a, AmxPanels b, bool add, AmxSums c) {
  static_assert(kRows * kColumns <= 4 && kRows <= 2);
  constexpr int64_t kPair = sizeof(BFloat16Pair), kNumber = sizeof(float);
  constexpr int kFirstB = 4 + kRows, kTilesOfB = 8 - kFirstB;
  constexpr std::make_integer_sequence<int, kRows * kColumns> kTilesOfC;
  const auto tile_of_c = [&](int tile) {
    return c.data + tile / kColumns * kTileSize * c.stride + tile % kColumns * kTileSize;
  };
  for_each(kTilesOfC, [&](auto tile) __attribute__((always_inline)) {
    if (add) {
      load<tile>(tile_of_c(tile), c.stride * kNumber);
    } else {
      zero<tile>();
    }
  });
  for (int64_t k = 0; k < depth; k += kTileSize) {
    for_each(kTilesOfC, [&](auto tile) __attribute__((always_inline)) {
      constexpr int kRow = tile / kColumns, kColumn = tile % kColumns;
      constexpr int kA = 4 + kRow, kB = kFirstB + kColumn % kTilesOfB;
      if constexpr (kColumn == 0) load<kA>(a.data + kRow * kTileSize * a.stride + k, a.stride * kPair);
      if constexpr (kRow == 0) load<kB>(b.data + kColumn * b.panel_stride + k * b.step_stride, b.step_stride * kPair);
      multiply_add<tile, kA, kB>();
    });
  }
  for_each(kTilesOfC, [&](auto tile) __attribute__((always_inline)) {
    store<tile>(tile_of_c(tile), c.stride * kNumber);
  });
}

// kRows tiles of A against all panels, in blocks of four tiles of C.
template <int kRows>
void multiply_rows(int64_t depth, AmxRows a, AmxPanels b, int64_t panels, bool add, AmxSums c) {
  constexpr int kColumns = 4 / kRows;
  const auto take = [&](auto columns) {
    multiply_block<kRows, columns>(depth, a, b, add, c);
    b.data += columns * b.panel_stride;
    c.data += columns * kTileSize;
    panels -= columns;
  };
  while (panels >= kColumns) take(std::integral_constant<int, kColumns>());
  while (panels > 0) take(std::integral_constant<int, 1>());
}

}  // namespace

bool multiplies_on_amx() { return amx_in_use().load(std::memory_order_relaxed); }

void use_amx(bool wanted) { amx_in_use() = wanted; }

const char* bfloat16_products() {
  if (!can_multiply_pairs()) return "float32";
  return multiplies_on_amx() ? "AMX" : "AVX512-BF16";
}

TileRegisters::TileRegisters(bool wanted) : configured_(wanted) {
  if (!wanted) return;
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } configuration;
  asm volatile("ldtilecfg %0" : : "m"(configuration));
}

TileRegisters::~TileRegisters() {
  if (configured_) asm volatile("tilerelease");
}

void multiply_on_amx(int64_t rows, int64_t depth, AmxRows a, AmxPanels b, int64_t panels, bool add, AmxSums c) {
  for (; rows > kTileSize; rows -= 2 * kTileSize) {
    multiply_rows<2>(depth, a, b, panels, add, c);
    a.data += 2 * kTileSize * a.stride;
    c.data += 2 * kTileSize * c.stride;
  }
  if (rows > 0) multiply_rows<1>(depth, a, b, panels, add, c);
}

#else

bool multiplies_on_amx() { return false; }

void use_amx(bool wanted) {
  if (wanted) throw std::invalid_argument("only the module for AVX-512 has products on AMX");
}

const char* bfloat16_products() { return "float32"; }

TileRegisters::TileRegisters(bool) : configured_(false) {}

TileRegisters::~TileRegisters() {}

#endif

}  // namespace leedl
