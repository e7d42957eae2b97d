// The extension module for NVIDIA GPUs.
#include <pybind11/pybind11.h>

#include "entry_points.h"
#include "tensor_caster.h"
#include "tensors.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of leedl_fast. Outputs are filled, never allocated; nothing is checked here.";

  namespace entry_points = leedl::entry_points;
  m.def("randn", &entry_points::randn);
  if (PyModule_AddFunctions(m.ptr(), leedl::tensor_functions) != 0) throw pybind11::error_already_set();
}
