// The part of DLPack 1.x that the bindings use, declared from its specification
// (https://dmlc.github.io/dlpack/latest/c_api.html), so that building needs no framework's headers.
// Field order and widths are the ABI: do not reorder.
#pragma once

#include <cstdint>

namespace pytransformer::dlpack {

enum DeviceType : int32_t { device_cpu = 1, device_cuda = 2, device_rocm = 10 };
enum DTypeCode : uint8_t { code_int = 0, code_float = 2, code_bfloat = 4, code_bool = 6 };

struct Device {
  int32_t device_type;
  int32_t device_id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

// DLManagedTensorVersioned: whoever has it calls ``deleter`` when it is done.
struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ApiHeader {
  Version version;
  ApiHeader* prev_api;
};

// Two functions are called; the others hold their place.
struct ExchangeApi {
  ApiHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  int (*managed_tensor_to_py_object_no_sync)(ManagedTensor* tensor, void** out);
  int (*dltensor_from_py_object_no_sync)(void* py_object, Tensor* out);
  void* current_work_stream;
};

}  // namespace pytransformer::dlpack
