// Storage types and float: values are widened when they are loaded, computed with in float, and rounded to nearest
// once, when they are stored.
#pragma once

#include "launch.h"

namespace pytransformer::cuda {

inline __device__ float to_float(float x) {
  return x;
}
inline __device__ float to_float(__half x) {
  return __half2float(x);
}
inline __device__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

// float x as it reads after being stored.
template <class T>
__device__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

// N neighbours, moved by one instruction where they are 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T data[N];
};

// How many of T make the widest load.
template <class T>
constexpr int widest = 16 / sizeof(T);

template <class T, int N>
__device__ Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <class T, int N>
__device__ void widen(const Pack<T, N>& pack, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = to_float(pack.data[i]);
}

template <class T, int N>
__device__ void load(const T* p, float (&x)[N]) {
  widen(load_pack<T, N>(p), x);
}

template <class T, int N>
__device__ void store(T* p, const float (&x)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.data[i] = from_float<T>(x[i]);
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

// A [columns] parameter: of the storage type of the op, or float32.
template <class T>
class Parameter {
 public:
  Parameter() = default;
  explicit Parameter(const TensorView& view) : data_(view.data), wide_(view.dtype == DType::float32) {}

  __device__ explicit operator bool() const { return data_ != nullptr; }

  template <int N>
  __device__ void load(int column, float (&x)[N]) const {
    if (!wide_) return cuda::load(static_cast<const T*>(data_) + column, x);
    constexpr int step = N < widest<float> ? N : widest<float>;
#pragma unroll
    for (int i = 0; i < N; i += step) {
      float part[step];
      cuda::load(static_cast<const float*>(data_) + column + i, part);
#pragma unroll
      for (int j = 0; j < step; ++j) x[i + j] = part[j];
    }
  }

 private:
  const void* data_ = nullptr;
  bool wide_ = false;
};

}  // namespace pytransformer::cuda
