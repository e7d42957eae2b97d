// The part of DLPack's C structures (https://dmlc.github.io/dlpack/latest/c_api.html) and of its exchange API 1.3 that
// reads a tensor. They are a stable binary interface: code compiled here reads the tensors of any torch that offers it.
#pragma once

#include <cstdint>

namespace leedl::dlpack {

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, index;
};

enum : uint8_t { kFloat = 2, kBFloat = 4 };

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

// What the capsule `torch.Tensor.__dlpack_c_exchange_api__` points to.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void (*managed_tensor_allocator)();
  void (*managed_tensor_from_py_object_no_sync)();
  void (*managed_tensor_to_py_object_no_sync)();
  int (*tensor_from_py_object_no_sync)(void* py_object, Tensor* out);  // 0, or -1 with a Python exception set
  int (*current_work_stream)(int32_t device_type, int32_t device_index, void** stream);  // 0, or -1 as above
};

constexpr char kExchangeApiName[] = "dlpack_exchange_api";
constexpr uint32_t kMajorVersion = 1;

}  // namespace leedl::dlpack
