// What stands for CUDA's header where kernels are compiled for the emulator: the language's words, the part of the
// runtime that csrc/cuda calls, and the device's functions.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

inline const emulator::Index &threadIdx = emulator::thread_index, &blockIdx = emulator::block_index;
inline const emulator::Index &blockDim = emulator::block_size, &gridDim = emulator::grid_size;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATED_VECTORS(type, name)                                                                \
  struct __attribute__((may_alias, aligned(2 * sizeof(type)))) name##2 { type x, y; };              \
  struct __attribute__((may_alias, aligned(4 * sizeof(type)))) name##4 { type x, y, z, w; };        \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                  \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned, uint)
#undef EMULATED_VECTORS

// The runtime.

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

namespace emulator {

constexpr size_t kDefaultSharedBytes = 48 << 10, kMostSharedBytes = 163 << 10;  // the latter of sm_80

cudaError_t allow_shared_bytes(const void* kernel, size_t bytes);
cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& run);

}  // namespace emulator

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  return emulator::allow_shared_bytes(reinterpret_cast<const void*>(kernel), bytes);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulator::launch(reinterpret_cast<const void*>(kernel), *config, [&] { kernel(arguments...); });
}

// The device.

constexpr int warpSize = emulator::kWarpSize;

using std::max;
using std::min;

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
template <typename T>
T __ldg(const T* from) {
  return *from;
}

inline void __syncthreads() { emulator::wait_for_block(); }
inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) { emulator::exchange("__syncwarp", mask, '\0'); }

namespace emulator {

// The value of lane `from` of the caller's segment of `width` lanes, or the caller's own.
template <typename T>
T shuffled(const char* instruction, uint32_t mask, T value, int from, int width, bool is_inside) {
  const T* const values = exchange(instruction, mask, value);
  const int first = static_cast<int>(lane) / width * width;
  return is_inside ? values[first + from % width] : value;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(uint32_t mask, T value, int from, int width = warpSize) {
  return emulator::shuffled("__shfl_sync", mask, value, from, width, true);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = warpSize) {
  const int from = static_cast<int>(emulator::lane % width) ^ bits;
  return emulator::shuffled("__shfl_xor_sync", mask, value, from, width, from < width);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int distance, int width = warpSize) {
  const int from = static_cast<int>(emulator::lane % width) + distance;
  return emulator::shuffled("__shfl_down_sync", mask, value, from, width, from < width);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int distance, int width = warpSize) {
  const int from = static_cast<int>(emulator::lane % width) - distance;
  return emulator::shuffled("__shfl_up_sync", mask, value, from, width, from >= 0);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  const bool* const predicates = emulator::exchange("__ballot_sync", mask, predicate);
  uint32_t ballot = 0;
  for (int i = 0; i < warpSize; ++i) {
    if ((mask >> i & 1) != 0 && predicates[i]) ballot |= 1u << i;
  }
  return ballot;
}
inline bool __any_sync(uint32_t mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(uint32_t mask, bool predicate) { return __ballot_sync(mask, predicate) == mask; }
