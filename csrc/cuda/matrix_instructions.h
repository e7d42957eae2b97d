// The instructions of kernels that multiply tiles on tensor cores: copies into shared memory that nobody waits for, loads
// of matrices into fragments, and the product of two fragments. All of them are there from compute capability 8.0 on.
//
// Fragments are how the 32 lanes of a warp share a matrix. With group = lane / 4 and member = lane % 4, a lane has
//   of A, 16 x 16, four pairs:   rows group, group + 8, group, group + 8 at columns 2 member + (0, 0, 8, 8) and the next
//   of B, 16 x 8, two pairs:     column group at rows 2 member + (0, 8) and the next
//   of C, 16 x 8, four numbers:  row group at columns 2 member and the next, then row group + 8 at the same
// so C of 16 x 16 numbers, rounded, is A of the next product, lane by lane.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "dtypes.h"

#if defined(__CUDACC__)

namespace leedl {

__device__ __forceinline__ uint32_t shared_address(const void* in_shared_memory) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(in_shared_memory));
}

// Begins a copy of 16 bytes to shared memory: the first `bytes` of them from `from`, a multiple of 16, the rest zeros.
// Of no bytes `from` may be any multiple of 16.
__device__ __forceinline__ void begin_copy_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

// The same of 4 bytes, or of none and zeros.
__device__ __forceinline__ void begin_copy_4(void* to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

// Waits for all copies that this thread began; others see them after the block's next barrier.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Loads four 8 x 8 matrices of two-byte numbers. Lane i says where row i % 8 of matrix i / 8 begins, a multiple of 16
// bytes; it gets of each matrix the numbers 2 member and the next of row `group`.
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&pairs)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
               : "r"(shared_address(row)));
}

// The same, but each lane gets the numbers `group` of rows 2 member and the next.
__device__ __forceinline__ void load_matrices_transposed(const void* row, uint32_t (&pairs)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
               : "r"(shared_address(row)));
}

// c += a b, of numbers of T, bfloat16 or float16, summed in float32.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// 2^x within 2 units in the last place; 0 where that is no normal number.
__device__ __forceinline__ float exp2_approximate(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

}  // namespace leedl

#else
#include "emulated_matrix_instructions.h"  // of tests/cuda
#endif
