#include "tensors.h"

#include <array>
#include <cstring>
#include <stdexcept>

namespace leedl {
namespace {

const dlpack::ExchangeApi* exchange_api = nullptr;
std::array<PyTypeObject*, 2> plain_types;  // torch.Tensor and torch.nn.Parameter

constexpr Py_ssize_t kMostTensors = 16;
constexpr int kMostDimensions = 8;
constexpr size_t kMostBytes =
    kMostTensors * (sizeof(dlpack::Device) + sizeof(dlpack::DataType) + 1 + kMostDimensions * sizeof(int64_t));

// False where this version of the interface is not known.
PyObject* read_tensors(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "read_tensors takes an exchange API and two types");
    return nullptr;
  }
  const void* capsule = PyCapsule_GetPointer(arguments[0], dlpack::kExchangeApiName);
  if (capsule == nullptr) return nullptr;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(capsule);
  if (api->version.major != dlpack::kMajorVersion || api->tensor_from_py_object_no_sync == nullptr) Py_RETURN_FALSE;
  exchange_api = api;
  for (size_t i = 0; i < plain_types.size(); ++i) {
    Py_INCREF(arguments[i + 1]);
    plain_types[i] = reinterpret_cast<PyTypeObject*>(arguments[i + 1]);
  }
  Py_RETURN_TRUE;
}

char* append(char* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  return to + bytes;
}

// Bytes that are equal for calls with equal devices, dtypes and shapes; a tensor may be None. Returns None where such a
// key cannot be made: other types, subclasses, tensors without dense storage. Python would make a tuple and hash it.
PyObject* signature(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  if (count > kMostTensors || exchange_api == nullptr) Py_RETURN_NONE;
  char key[kMostBytes];
  char* end = key;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (tensors[i] == Py_None) {
      *end++ = -1;
      continue;
    }
    const PyTypeObject* type = Py_TYPE(tensors[i]);
    if (type != plain_types[0] && type != plain_types[1]) Py_RETURN_NONE;
    dlpack::Tensor tensor;
    if (exchange_api->tensor_from_py_object_no_sync(tensors[i], &tensor) != 0) {
      PyErr_Clear();
      Py_RETURN_NONE;
    }
    if (tensor.ndim > kMostDimensions) Py_RETURN_NONE;
    *end++ = static_cast<char>(tensor.ndim);
    end = append(end, &tensor.device, sizeof(tensor.device));
    end = append(end, &tensor.dtype, sizeof(tensor.dtype));
    end = append(end, tensor.shape, tensor.ndim * sizeof(int64_t));
  }
  return PyBytes_FromStringAndSize(key, end - key);
}

// METH_FASTCALL functions have another signature than PyCFunction, which the void pointer's cast says is meant.
template <typename Function>
PyCFunction erased(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace

DType Tensor::dtype() const {
  const auto [code, bits, lanes] = tensor_.dtype;
  if (lanes == 1) {
    if (code == dlpack::kFloat && bits == 32) return DType::kFloat32;
    if (code == dlpack::kFloat && bits == 64) return DType::kFloat64;
    if (code == dlpack::kBFloat && bits == 16) return DType::kBFloat16;
    if (code == dlpack::kFloat && bits == 16) return DType::kFloat16;
  }
  throw std::invalid_argument("a tensor must be float32, float64, bfloat16 or float16");
}

void* Tensor::stream() const {
  void* stream = nullptr;
  const auto [type, index] = tensor_.device;
  if (exchange_api->current_work_stream(type, index, &stream) != 0) {
    throw std::runtime_error("torch does not tell the current stream of the tensors' device");
  }
  return stream;
}

int64_t Tensor::numel() const {
  int64_t numel = tensor_.data == nullptr ? 0 : 1;
  for (int i = 0; i < tensor_.ndim; ++i) numel *= tensor_.shape[i];
  return numel;
}

int64_t Tensor::row_stride() const {
  const int last = tensor_.ndim - 1;
  if (numel() == 0 || last == 0) return is_contiguous() ? size(-1) : -1;
  if (tensor_.shape[last] > 1 && tensor_.strides[last] != 1) return -1;
  int64_t stride = 0, rows = 1;  // of the rows so far
  for (int i = last - 1; i >= 0; --i) {
    if (tensor_.shape[i] == 1) continue;
    if (rows == 1) {
      stride = tensor_.strides[i];
    } else if (tensor_.strides[i] != rows * stride) {
      return -1;
    }
    rows *= tensor_.shape[i];
  }
  return rows == 1 ? size(-1) : stride;
}

bool Tensor::is_contiguous() const {
  int64_t expected = 1;
  for (int i = tensor_.ndim - 1; i >= 0; --i) {
    if (tensor_.shape[i] == 0) return true;
    if (tensor_.shape[i] > 1 && tensor_.strides[i] != expected) return false;
    expected *= tensor_.shape[i];
  }
  return true;
}

bool read_tensor(PyObject* object, Tensor* tensor) {
  if (object == Py_None) {
    *tensor = Tensor();
    return true;
  }
  if (exchange_api == nullptr || !PyObject_TypeCheck(object, plain_types[0])) return false;
  dlpack::Tensor read;
  if (exchange_api->tensor_from_py_object_no_sync(object, &read) != 0) return false;
  *tensor = Tensor(read);
  return true;
}

PyMethodDef tensor_functions[] = {
    {"read_tensors", erased(read_tensors), METH_FASTCALL, "read_tensors(exchange_api, tensor_type, parameter_type)"},
    {"signature", erased(signature), METH_FASTCALL, "signature(*tensors): the key of a call's checks, or None"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace leedl
