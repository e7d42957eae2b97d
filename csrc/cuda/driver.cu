// Whether this machine's driver runs what the module was built with.
#include "entry_points.h"
#include "runtime.h"

namespace leedl::entry_points {

std::string driver_error() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // as in check
  return error_text(error);
}

}  // namespace leedl::entry_points
