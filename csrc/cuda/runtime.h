// How kernels are launched: on the device of the tensors and on torch's current stream there, without waiting, without
// allocating, so that a CUDA graph can capture it. Every launch is checked.
#pragma once

#include "tensors.h"  // Python.h, which must come first

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace leedl {

inline std::string error_text(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next one who asks is told of this error
  throw std::runtime_error("CUDA says " + error_text(error));
}

template <typename Integer>
__host__ __device__ constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// So many blocks as the x of a grid.
inline unsigned grid_size(int64_t blocks) {
  constexpr int64_t kMost = 0x7FFFFFFF;
  if (blocks > kMost) throw std::invalid_argument("the tensors are too large for one launch");
  return static_cast<unsigned>(blocks);
}

// The stream on which the work on `tensor` is done; its device is the current one while this lives.
class Stream {
 public:
  explicit Stream(const Tensor& tensor) : stream_(static_cast<cudaStream_t>(tensor.stream())) {
    check(cudaGetDevice(&device_before_));
    is_other_device_ = device_before_ != tensor.device_index();
    if (is_other_device_) check(cudaSetDevice(tensor.device_index()));
  }
  ~Stream() {
    if (is_other_device_) cudaSetDevice(device_before_);
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
              Arguments&&... arguments) const {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    // A full queue makes a launch wait for the GPU, and the GPU may wait for a callback in Python.
    PyThreadState* const python = PyEval_SaveThread();
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
    PyEval_RestoreThread(python);
    check(error);
  }

 private:
  cudaStream_t stream_;
  int device_before_ = 0;
  bool is_other_device_ = false;
};

}  // namespace leedl
