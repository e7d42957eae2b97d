// Every instruction that C++ has no words for, each as one function.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDACC__)

namespace leedl {

// The block's shared memory, as much as its launch asked for.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// 16 bytes at a multiple of 16; in global memory where they are stored. Left to itself, the compiler stores a vector's
// words one by one.
__device__ __forceinline__ uint4 load_vector(const void* from) { return *static_cast<const uint4*>(from); }

__device__ __forceinline__ void store_vector(void* to, uint4 vector) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(vector.x),
               "r"(vector.y), "r"(vector.z), "r"(vector.w)
               : "memory");
}

// Two numbers rounded to bfloat16 or float16, `low` in the low half.
__device__ __forceinline__ uint32_t bfloat16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ uint32_t float16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float float_of_float16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

}  // namespace leedl

#else
#include "emulated_instructions.h"  // of tests/cuda, which run kernels on the host
#endif
