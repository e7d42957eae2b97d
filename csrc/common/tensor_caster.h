// Arguments of type Tensor in functions that pybind11 binds.
#pragma once

#include <pybind11/pybind11.h>

#include "tensors.h"

template <>
struct pybind11::detail::type_caster<leedl::Tensor> {
  PYBIND11_TYPE_CASTER(leedl::Tensor, const_name("torch.Tensor | None"));
  bool load(handle source, bool) {
    const bool is_read = leedl::read_tensor(source.ptr(), &value);
    if (PyErr_Occurred() != nullptr) throw error_already_set();
    return is_read;
  }
};
