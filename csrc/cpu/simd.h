// The vector type of the instruction set that this translation unit is compiled for.
//
// Each kernel source is compiled once per instruction set, with PYTRANSFORMER_ISA naming the
// namespace it lives in (scalar, avx2, avx512, avx512_bf16, amx_bf16, ...). All of them see the same few types:
//
//   Vec    `lanes` float32 values        Mask   one bit a lane        UVec   `lanes` uint32 values
//
// and the micro-tile that fills the register file: tile_rows x tile_vecs vectors of accumulators.
// Storage types are widened to float32 on load and rounded to nearest-even on store.
#pragma once

#include <cstdint>

#include "storage.h"

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

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
