// Storage types and float: values are widened when they are loaded, computed with in float, and rounded to nearest
// once, when they are stored.
#pragma once

#include "launch.h"
#include "ptx.cuh"

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

// N neighbours, moved by one instruction where they are 16 bytes. Two of 16 bits are held as a word, which the compiler
// otherwise takes apart and puts together whenever a pack is copied.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  using Unit = std::conditional_t<sizeof(T) == 2 && N % 2 == 0, uint32_t, T>;
  Unit data[sizeof(T) * N / sizeof(Unit)];
};

// How many of T make the widest load.
template <class T>
constexpr int widest = 16 / sizeof(T);

template <class T, int N>
__device__ Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

// Elements 2 i and 2 i + 1 of a pack, in a word. bfloat16 is the upper half of a float: one instruction each.
template <class T>
__device__ void widen_word(uint32_t word, float& low, float& high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
  } else {
    low = to_float(__ushort_as_half(uint16_t(word)));
    high = to_float(__ushort_as_half(uint16_t(word >> 16)));
  }
}

template <class T, int N>
__device__ void widen(const Pack<T, N>& pack, float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (std::is_same_v<typename Pack<T, N>::Unit, T>) {
      x[i] = to_float(pack.data[i]);
    } else if (i % 2 == 0) {
      widen_word<T>(pack.data[i / 2], x[i], x[i + 1]);
    }
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
  for (int i = 0; i < N; ++i) {
    if constexpr (std::is_same_v<typename Pack<T, N>::Unit, T>) {
      pack.data[i] = from_float<T>(x[i]);
    } else if (i % 2 == 0) {
      pack.data[i / 2] = ptx::pack<T>(x[i], x[i + 1]);
    }
  }
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
