// The functions of csrc/cuda/matrix_instructions.h, on the host.
//
// A copy overwrites its target with NaN when it begins, and brings its numbers when it is waited for: the device may do
// both at any time between. Rows of a matrix that lie in the same banks of shared memory are an error, though the device
// would only be slow.
#pragma once

#include <cfloat>
#include <cstdio>
#include <type_traits>
#include <vector>

#include "dtypes.h"
#include "emulated_instructions.h"
#include "emulator.h"

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  int size, bytes;
  Index block;
};

// Of the thread that is running. None must be left when it ends.
inline std::vector<Copy>& copies_begun() {
  static std::vector<Copy> of_threads[kMostThreads];
  return of_threads[(thread_index.z * block_size.y + thread_index.y) * block_size.x + thread_index.x];
}

[[noreturn]] inline void stop(const char* reason) {
  std::fprintf(stderr, "emulator: %s\n", reason);
  std::abort();
}

inline void begin_copy(void* to, const void* from, int size, int bytes) {
  check_alignment(to, size);
  check_alignment(from, size);
  std::memset(to, 0xFF, size);
  std::vector<Copy>& copies = copies_begun();
  if (!copies.empty() && std::memcmp(&copies[0].block, &block_index, sizeof(Index)) != 0) {
    stop("a thread of an earlier block ended before its copies");
  }
  copies.push_back({to, from, size, bytes, block_index});
}

// What every lane says is the beginning of its row of eight numbers.
inline const uint16_t* const* matrix_rows(const char* instruction, const void* row) {
  const auto* const rows = exchange(instruction, 0xFFFFFFFFu, static_cast<const uint16_t*>(row));
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned banks = 0;
    for (int i = 0; i < 8; ++i) banks |= 1u << (reinterpret_cast<uintptr_t>(rows[8 * matrix + i]) / 16 % 8);
    if (banks != 0xFF) stop("rows of a matrix lie in the same banks");
  }
  return rows;
}

struct Fragments {
  uint32_t a[4], b[2];
};

template <typename T>
float half_of(uint32_t pair, int i) {
  const auto bits = static_cast<uint16_t>(pair >> (16 * i));
  if constexpr (std::is_same_v<T, leedl::BFloat16>) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  return leedl::float_of_float16(bits);
}

}  // namespace emulator

namespace leedl {

inline void begin_copy_16(void* to, const void* from, int bytes) { emulator::begin_copy(to, from, 16, bytes); }
inline void begin_copy_4(void* to, const void* from, int bytes) { emulator::begin_copy(to, from, 4, bytes); }

inline void wait_for_copies() {
  for (const auto& [to, from, size, bytes, block] : emulator::copies_begun()) {
    std::memset(to, 0, size);
    if (bytes > 0) std::memcpy(to, from, bytes);
  }
  emulator::copies_begun().clear();
}

inline void load_matrices(const void* row, uint32_t (&pairs)[4]) {
  const uint16_t* const* rows = emulator::matrix_rows("ldmatrix", row);
  for (int i = 0; i < 4; ++i) std::memcpy(&pairs[i], rows[8 * i + emulator::lane / 4] + 2 * (emulator::lane % 4), 4);
}

inline void load_matrices_transposed(const void* row, uint32_t (&pairs)[4]) {
  const uint16_t* const* rows = emulator::matrix_rows("ldmatrix.trans", row);
  const unsigned group = emulator::lane / 4, member = emulator::lane % 4;
  for (int i = 0; i < 4; ++i) {
    const uint16_t* const* const matrix = rows + 8 * i + 2 * member;
    pairs[i] = static_cast<uint32_t>(matrix[1][group]) << 16 | matrix[0][group];
  }
}

// Sums exactly, as good as the device can.
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const emulator::Fragments mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const emulator::Fragments* const of = emulator::exchange("mma", 0xFFFFFFFFu, mine);
  const unsigned group = emulator::lane / 4, member = emulator::lane % 4;
  float rows[2][16], columns[2][16];
  for (int k = 0; k < 16; ++k) {
    const unsigned other = k % 8 / 2;  // the member that has it
    for (int i = 0; i < 2; ++i) {
      rows[i][k] = emulator::half_of<T>(of[4 * group + other].a[i + k / 8 * 2], k % 2);
      columns[i][k] = emulator::half_of<T>(of[4 * (2 * member + i) + other].b[k / 8], k % 2);
    }
  }
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 16; ++k) sum += static_cast<double>(rows[i / 2][k]) * columns[i % 2][k];
    c[i] = static_cast<float>(sum);
  }
}

inline float exp2_approximate(float x) {
  const float power = std::exp2(x);
  return power < FLT_MIN ? 0.0f : power;
}

}  // namespace leedl
