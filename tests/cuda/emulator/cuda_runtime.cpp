#include "cuda_runtime.h"

#include <map>

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    default:
      return "cudaErrorInvalidConfiguration";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "invalid configuration argument";
  }
}

namespace emulator {

namespace {

std::map<const void*, size_t>& allowed_bytes() {
  static std::map<const void*, size_t> allowed;
  return allowed;
}

}  // namespace

cudaError_t allow_shared_bytes(const void* kernel, size_t bytes) {
  if (bytes > kMostSharedBytes) return cudaErrorInvalidValue;
  allowed_bytes()[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, const std::function<void()>& run) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const auto is_between = [](unsigned size, unsigned most) { return size >= 1 && size <= most; };
  if (!is_between(grid.x, 0x7FFFFFFF) || !is_between(grid.y, 65535) || !is_between(grid.z, 65535) ||
      !is_between(block.x, 1024) || !is_between(block.y, 1024) || !is_between(block.z, 64) ||
      block.x * block.y * block.z > kMostThreads) {
    return cudaErrorInvalidConfiguration;
  }
  const auto allowed = allowed_bytes().find(kernel);
  if (config.dynamicSmemBytes > (allowed == allowed_bytes().end() ? kDefaultSharedBytes : allowed->second)) {
    return cudaErrorInvalidValue;
  }
  run_grid({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, config.dynamicSmemBytes, run);
  return cudaSuccess;
}

}  // namespace emulator
