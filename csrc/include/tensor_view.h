// A borrowed look at a tensor: what a kernel needs to know, and nothing that owns memory.
//
// The compiled modules link no libtorch. The bindings fill a TensorView from whatever framework
// tensor they were handed; kernels see only this. An absent optional tensor has `defined == false`.
#pragma once

#include <cstdint>

namespace pytransformer {

// Storage type of a bfloat16: the upper half of a float32.
struct bfloat16 {
  uint16_t bits;
};

// Storage type of an IEEE binary16.
struct float16 {
  uint16_t bits;
};

enum class DType : int32_t { float32, float64, float16, bfloat16, int32, int64, boolean };

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::float16: return "float16";
    case DType::bfloat16: return "bfloat16";
    case DType::int32: return "int32";
    case DType::int64: return "int64";
    case DType::boolean: return "bool";
  }
  return "?";
}

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return 4;
    case DType::float64: return 8;
    case DType::float16: return 2;
    case DType::bfloat16: return 2;
    case DType::int32: return 4;
    case DType::int64: return 8;
    case DType::boolean: return 1;
  }
  return 0;
}

// Whether the kernels take tensors of this type.
inline bool stored(DType dtype) {
  return dtype == DType::float32 || dtype == DType::float16 || dtype == DType::bfloat16;
}

inline bool contiguous(int ndim, const int64_t* shape, const int64_t* stride) {
  for (int i = 0; i < ndim; ++i) {
    if (shape[i] == 0) return true;
  }
  int64_t expected = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] != 1 && stride[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

struct TensorView {
  static constexpr int max_dims = 6;

  void* data = nullptr;
  int64_t shape[max_dims] = {};
  int64_t stride[max_dims] = {};  // in elements; 0 for a broadcast dimension
  int ndim = 0;
  DType dtype = DType::float32;
  bool defined = false;

  explicit operator bool() const { return defined; }

  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }

  bool contiguous() const { return pytransformer::contiguous(ndim, shape, stride); }
};

}  // namespace pytransformer
