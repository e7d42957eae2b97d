// Small kernels, some of them wrong, that show what the emulator sees.
#include <cstring>
#include <stdexcept>
#include <string>

#include "instructions.h"
#include "matrix_instructions.h"
#include "reductions.h"

namespace {

using leedl::shared_memory;

// A block's numbers, backwards, by way of shared memory.
__global__ void reverse(float* out, bool waits) {
  float* const memory = shared_memory<float>();
  memory[threadIdx.x] = out[threadIdx.x];
  if (waits) __syncthreads();
  out[threadIdx.x] = memory[blockDim.x - 1 - threadIdx.x];
}

// Every thread reads its neighbour's number before that one writes its next, if it waits.
__global__ void shift_twice(float* out, bool waits) {
  float* const memory = shared_memory<float>();
  float value = out[threadIdx.x];
  for (int i = 0; i < 2; ++i) {
    memory[threadIdx.x] = value;
    __syncthreads();
    value = memory[(threadIdx.x + 1) % blockDim.x];
    if (waits) __syncthreads();
  }
  out[threadIdx.x] = value;
}

// The same as `reverse`, by copies.
__global__ void reverse_copies(float* out, bool waits) {
  float* const memory = shared_memory<float>();
  leedl::begin_copy_4(memory + threadIdx.x, out + threadIdx.x, 4);
  if (waits) leedl::wait_for_copies();
  __syncthreads();
  const float value = memory[blockDim.x - 1 - threadIdx.x];
  leedl::wait_for_copies();
  __syncthreads();
  out[threadIdx.x] = value;
}

// The sum of what the block's threads have, minus itself, plus itself.
__global__ void sum_thrice(float* out, int places) {
  float total = 0;
  for (int i = 0; i < 3; ++i) {
    float values[1] = {i == 1 ? -out[threadIdx.x] : out[threadIdx.x]};
    const int place = i % places * (blockDim.x / leedl::kWarpSize);
    leedl::sum_over_block(values, shared_memory<float[1]>() + place);
    total += values[0];
  }
  out[threadIdx.x] = total;
}

__global__ void wait_in_half_of_a_warp(float*) {
  if (threadIdx.x % 2 == 0) __syncwarp();
}

__global__ void wait_at_different_instructions(float* out) {
  if (threadIdx.x % 2 == 0) {
    __syncwarp();
  } else {
    out[threadIdx.x] = __shfl_sync(leedl::kWholeWarp, out[threadIdx.x], 0);
  }
}

__global__ void wait_in_one_warp(float*) {
  if (threadIdx.x < leedl::kWarpSize) {
    __syncthreads();
  } else {
    __syncwarp(leedl::kWholeWarp);
    if (threadIdx.x % 2 == 0) __syncwarp();
  }
}

// Threads that have ended are not waited for.
__global__ void end_early(float* out) {
  if (threadIdx.x >= leedl::kWarpSize) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

template <typename... Arguments>
void launch(void (*kernel)(float*, Arguments...), unsigned threads, size_t bytes, float* out, Arguments... arguments) {
  const cudaLaunchConfig_t config = {{1}, {threads}, bytes, nullptr, nullptr, 0};
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, out, arguments...);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorName(error));
}

}  // namespace

// Runs the kernel on `threads` numbers; returns "", or what the emulator says. `said` is valid until the next call.
extern "C" __attribute__((visibility("default"))) const char* run(const char* kernel, uint64_t seed, unsigned threads,
                                                                  size_t bytes, float* out) {
  static std::string said;
  said.clear();
  emulator::set_seed(seed);
  const auto is = [kernel](const char* name) { return std::strcmp(kernel, name) == 0; };
  try {
    if (is("reverse")) launch(reverse, threads, bytes, out, true);
    if (is("reverse-without-waiting")) launch(reverse, threads, bytes, out, false);
    if (is("reverse-copies")) launch(reverse_copies, threads, bytes, out, true);
    if (is("reverse-copies-without-waiting")) launch(reverse_copies, threads, bytes, out, false);
    if (is("shift-twice")) launch(shift_twice, threads, bytes, out, true);
    if (is("shift-twice-without-waiting")) launch(shift_twice, threads, bytes, out, false);
    if (is("sum")) launch(sum_thrice, threads, bytes, out, 2);
    if (is("sum-in-one-place")) launch(sum_thrice, threads, bytes, out, 1);
    if (is("half-of-a-warp")) launch(wait_in_half_of_a_warp, threads, bytes, out);
    if (is("different-instructions")) launch(wait_at_different_instructions, threads, bytes, out);
    if (is("one-warp")) launch(wait_in_one_warp, threads, bytes, out);
    if (is("end-early")) launch(end_early, threads, bytes, out);
  } catch (const std::exception& error) {
    said = error.what();
  }
  return said.c_str();
}
