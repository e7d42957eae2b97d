// The extension module. It is compiled once per instruction set; LEEDL_CPU_MODULE names the copy.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "amx.h"
#include "entry_points.h"
#include "tensor_caster.h"
#include "tensors.h"

namespace {

// Whether the processor has the instructions of the copy compiled for `isa`. The baseline copy is asked, before another
// one is loaded: loading it already runs its instructions.
bool processor_can_run(const std::string& isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == "baseline";
}

}  // namespace

PYBIND11_MODULE(LEEDL_CPU_MODULE, m) {
  m.doc() = "CPU kernels of leedl_fast. Outputs are filled, never allocated; nothing is checked here.";
  m.def("processor_can_run", &processor_can_run);
  m.def("bfloat16_products", &leedl::bfloat16_products);
  m.def("use_amx", &leedl::use_amx);

  namespace entry_points = leedl::entry_points;
  using ReleaseGil = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("attention_forward", &entry_points::attention_forward, ReleaseGil());
  m.def("attention_backward", &entry_points::attention_backward, ReleaseGil());
  m.def("additive_attention_forward", &entry_points::additive_attention_forward, ReleaseGil());
  m.def("additive_attention_backward", &entry_points::additive_attention_backward, ReleaseGil());
  m.def("add_layer_norm_forward", &entry_points::add_layer_norm_forward, ReleaseGil());
  m.def("add_layer_norm_dropout_backward", &entry_points::add_layer_norm_dropout_backward, ReleaseGil());
  m.def("add_layer_norm_backward", &entry_points::add_layer_norm_backward, ReleaseGil());
  m.def("linear_cross_entropy", &entry_points::linear_cross_entropy, ReleaseGil());
  m.def("sample_seeds", &entry_points::sample_seeds, ReleaseGil());
  m.def("randn", &entry_points::randn, ReleaseGil());
  m.def("add_noise", &entry_points::add_noise, ReleaseGil());
  m.def("noise_prediction_loss_forward", &entry_points::noise_prediction_loss_forward, ReleaseGil());
  m.def("noise_prediction_loss_backward", &entry_points::noise_prediction_loss_backward, ReleaseGil());
  m.def("step", &entry_points::step, ReleaseGil());
  m.def("philox4x32_10", &entry_points::philox4x32_10);
  m.def("normal_pair", &entry_points::normal_pair);
  if (PyModule_AddFunctions(m.ptr(), leedl::tensor_functions) != 0) throw pybind11::error_already_set();
}
