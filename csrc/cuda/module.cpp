// The extension module for NVIDIA GPUs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "entry_points.h"
#include "tensor_caster.h"
#include "tensors.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of leedl_fast. Outputs are filled, never allocated; nothing is checked here.";

  namespace entry_points = leedl::entry_points;
  m.def("driver_error", &entry_points::driver_error);
  m.def("add_layer_norm_forward", &entry_points::add_layer_norm_forward);
  m.def("add_layer_norm_dropout_backward", &entry_points::add_layer_norm_dropout_backward);
  m.def("add_layer_norm_backward", &entry_points::add_layer_norm_backward);
  m.def("attention_forward", &entry_points::attention_forward);
  m.def("attention_backward", &entry_points::attention_backward);
  m.def("randn", &entry_points::randn);
  m.def("add_noise", &entry_points::add_noise);
  m.def("noise_prediction_loss_forward", &entry_points::noise_prediction_loss_forward);
  m.def("noise_prediction_loss_backward", &entry_points::noise_prediction_loss_backward);
  m.def("step", &entry_points::step);
  if (PyModule_AddFunctions(m.ptr(), leedl::tensor_functions) != 0) throw pybind11::error_already_set();
}
