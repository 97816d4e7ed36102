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

// bfloat16 is the upper half of a float: two of a word take one instruction each.
template <class T, int N>
__device__ void widen(const Pack<T, N>& pack, float (&x)[N]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && N % 2 == 0) {
    uint32_t words[N / 2];
    memcpy(words, pack.data, sizeof words);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(pack.data[i]);
  }
}

template <class T, int N>
__device__ void load(const T* p, float (&x)[N]) {
  widen(load_pack<T, N>(p), x);
}

// N neighbours at an address that is a multiple of 16 bytes at most.
template <class T, int N>
__device__ void load_neighbours(const T* p, float (&x)[N]) {
  constexpr int step = N < widest<T> ? N : widest<T>;
#pragma unroll
  for (int i = 0; i < N; i += step) {
    float part[step];
    load(p + i, part);
#pragma unroll
    for (int j = 0; j < step; ++j) x[i + j] = part[j];
  }
}

template <class T, int N>
__device__ Pack<T, N> narrow(const float (&x)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.data[i] = from_float<T>(x[i]);
  return pack;
}

template <class T, int N>
__device__ void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

template <class T, int N>
__device__ void store(T* p, const float (&x)[N]) {
  store_pack(p, narrow<T>(x));
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
    visit([&](auto* data) { load_neighbours(data + column, x); });
  }

  // f(pointer to the values), as T or as float.
  template <class F>
  __device__ void visit(const F& f) const {
    wide_ ? f(static_cast<const float*>(data_)) : f(static_cast<const T*>(data_));
  }

 private:
  const void* data_ = nullptr;
  bool wide_ = false;
};

}  // namespace pytransformer::cuda
