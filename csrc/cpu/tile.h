// The micro-tile: the one inner loop that every matrix product of this library runs in.
//
// acc[Rows][Vecs] += A[Rows, depth] * B[depth, Vecs * lanes], with the accumulators in registers: on
// AVX-512 6 x 4 = 24 of 32, leaving four for a row of B and one for a broadcast of A. Per step of depth
// it issues Rows * Vecs multiply-adds for Vecs loads and Rows broadcasts: with two FMA ports and two
// load ports, 12 cycles of arithmetic hide 5 cycles of loads, as long as B comes from L1 or L2.
//
// B is packed by the caller: [depth][Vecs * lanes] float32, or with AVX512-BF16 [depth / 2][Vecs * lanes][2]
// bfloat16 pairs. A is read in place, element (row, k) at a[row * row_stride + k * depth_stride]; in the
// paired form a pair (row, k), (row, k + 1) is one unit of depth_stride. Other instruction sets widen
// bfloat16 to float32 while packing: `operand_t<T>` is the type that T is packed into.
#pragma once

#include "simd.h"

namespace pytransformer::PYTRANSFORMER_ISA {

template <class T>
struct OperandOf {
  using type = float;
};
#ifdef PYTRANSFORMER_BF16_DOT
template <>
struct OperandOf<bfloat16> {
  using type = bfloat16;
};
#endif
template <class T>
using operand_t = typename OperandOf<T>::type;

// How many consecutive k one step of the tile consumes.
template <class Operand>
constexpr int depth_step = sizeof(float) / sizeof(Operand);

template <int Rows, int Vecs>
inline __attribute__((always_inline)) void clear(Vec (&acc)[Rows][Vecs]) {
  for (auto& row : acc)
    for (Vec& v : row) v = Vec::zero();
}

// `steps` counts depth_step's; b_stride is the distance between the packed rows of B, in operands.
template <int Rows, int Vecs>
inline __attribute__((always_inline)) void multiply_add(const float* a, int64_t row_stride, int64_t depth_stride,
                                                        const float* b, int64_t b_stride, int64_t steps,
                                                        Vec (&acc)[Rows][Vecs]) {
  for (int64_t k = 0; k < steps; ++k) {
    Vec row[Vecs];
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) row[j] = Vec::load(b + k * b_stride + j * Vec::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const Vec x = Vec::set1(a[i * row_stride + k * depth_stride]);
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) acc[i][j] = fma(x, row[j], acc[i][j]);
    }
  }
}

#ifdef PYTRANSFORMER_BF16_DOT
template <int Rows, int Vecs>
inline __attribute__((always_inline)) void multiply_add(const bfloat16* a, int64_t row_stride, int64_t depth_stride,
                                                        const bfloat16* b, int64_t b_stride, int64_t steps,
                                                        Vec (&acc)[Rows][Vecs]) {
  for (int64_t k = 0; k < steps; ++k) {
    PairVec row[Vecs];
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) row[j] = PairVec::load(b + k * b_stride + j * 2 * Vec::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const PairVec x = PairVec::broadcast(a + i * row_stride + k * depth_stride);
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) acc[i][j] = dot(x, row[j], acc[i][j]);
    }
  }
}
#endif

}  // namespace pytransformer::PYTRANSFORMER_ISA
