// The tensors that Python hands over. They are read here, because to ask them for addresses, sizes and strides in Python
// costs as much as a small kernel.
#pragma once

#include <Python.h>

#include <cstdint>

#include "dlpack.h"
#include "dtypes.h"

namespace leedl {

// A tensor that lives while Python's call does, or none: then its data is null.
class Tensor {
 public:
  Tensor() : tensor_{} {}
  explicit Tensor(const dlpack::Tensor& tensor) : tensor_(tensor) {}

  explicit operator bool() const { return tensor_.data != nullptr; }

  std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(tensor_.data) + tensor_.byte_offset; }
  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(address());
  }
  DType dtype() const;  // throws where it is another one
  int device_index() const { return tensor_.device.index; }
  void* stream() const;  // on which torch has the work of the tensor's device done
  int dimensions() const { return tensor_.ndim; }
  int64_t size(int dimension) const { return tensor_.shape[dimension < 0 ? tensor_.ndim + dimension : dimension]; }
  int64_t stride(int dimension) const { return tensor_.strides[dimension]; }  // in elements
  int64_t numel() const;  // 0 for none
  bool is_contiguous() const;
  // The distance between rows along the last dimension where it is the same from each to the next and their elements lie
  // one after another; -1 otherwise.
  int64_t row_stride() const;

 private:
  dlpack::Tensor tensor_;
};

// False, with or without a Python exception, where `object` is no tensor that can be read. None is a Tensor, too.
bool read_tensor(PyObject* object, Tensor* tensor);

// read_tensors(exchange_api, tensor_type, parameter_type) and signature(*tensors).
extern PyMethodDef tensor_functions[];

}  // namespace leedl
