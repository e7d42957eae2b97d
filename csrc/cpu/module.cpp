// The extension module. It is compiled once per instruction set; LEEDL_CPU_MODULE names the copy.
#include <pybind11/pybind11.h>

#include "bindings.h"

namespace {

// Whether the processor has the instructions that this copy was compiled for.
bool processor_can_run() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
#else
  return true;
#endif
}

}  // namespace

PYBIND11_MODULE(LEEDL_CPU_MODULE, m) {
  m.doc() = "CPU kernels of leedl_fast. Outputs are filled, never allocated; nothing is checked here.";
  m.def("processor_can_run", &processor_can_run);
  leedl::bind_attention(m);
  leedl::bind_additive_attention(m);
  leedl::bind_add_layer_norm(m);
  leedl::bind_diffusion(m);
  leedl::bind_linear_cross_entropy(m);
}
