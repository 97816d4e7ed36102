// The vector type of the instruction set that this translation unit is compiled for.
//
// Each kernel source is compiled once per instruction set, with PYTRANSFORMER_ISA naming the
// namespace it lives in (scalar, avx2, avx512, avx512_bf16, ...). All of them see the same few types:
//
//   Vec    `lanes` float32 values        Mask   one bit a lane        UVec   `lanes` uint32 values
//
// and the micro-tile that fills the register file: tile_rows x tile_vecs vectors of accumulators.
// Storage types are widened to float32 on load and rounded to nearest-even on store.
#pragma once

#include <cstdint>

#include "tensor_view.h"

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(PYTRANSFORMER_NEON)
#include "simd_neon.h"
#else
#include "simd_scalar.h"
#endif

namespace pytransformer::PYTRANSFORMER_ISA {

inline float to_float(float x) {
  return x;
}
inline float to_float(bfloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if (x != x) return {uint16_t((bits >> 16) | 0x40)};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
