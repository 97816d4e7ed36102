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
//
// AMX takes the paired form, too, but a tile has 16 rows, A lies along k, and the sums are in memory: what a tile is
// used for is asked of `on_unit`, and multiply_on_unit (simd_amx.h) takes the place of multiply_add.
#pragma once

#include <utility>

#include "simd.h"
#include "simd_amx.h"

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

// Whether AMX multiplies tiles of A by tiles of B, and how many rows a tile of A then has.
template <class A, class B = A>
constexpr bool on_unit = false;
#ifdef PYTRANSFORMER_AMX
template <>
constexpr bool on_unit<bfloat16, bfloat16> = true;
template <class Operand>
constexpr int rows_of_tile = on_unit<Operand> ? unit_rows : tile_rows;
#else
template <class Operand>
constexpr int rows_of_tile = tile_rows;
#endif

// The instance of a function template for a tile of rows x columns, or where these are more than there are instances
// for, the largest. A family names the template: `template <int Rows, int Columns> static constexpr auto of = &...;`
template <class Family, int Rows, int Columns, int... I>
auto instance_at(int index, std::integer_sequence<int, I...>) {
  static constexpr decltype(Family::template of<1, 1>) instances[] = {
      Family::template of<I / Columns + 1, I % Columns + 1>...};
  return instances[index];
}
template <class Family, int Rows, int Columns>
auto instance_for(int64_t rows, int64_t columns) {
  const int row = int(rows < Rows ? rows : Rows) - 1, column = int(columns < Columns ? columns : Columns) - 1;
  return instance_at<Family, Rows, Columns>(row * Columns + column, std::make_integer_sequence<int, Rows * Columns>());
}

template <int Rows, int Vecs>
inline __attribute__((always_inline)) void clear(Vec (&acc)[Rows][Vecs]) {
  for (auto& row : acc)
    for (Vec& v : row) v = Vec::zero();
}

// `steps` counts depth_step's; b_stride is the distance between the packed rows of B, in operands. With A of float32, B
// may be of any storage type, widened as it is read.
template <int Rows, int Vecs, class T>
inline __attribute__((always_inline)) void multiply_add(const float* a, int64_t row_stride, int64_t depth_stride,
                                                        const T* b, int64_t b_stride, int64_t steps,
                                                        Vec (&acc)[Rows][Vecs]) {
  for (int64_t k = 0; k < steps; ++k) {
    Vec row[Vecs];
#pragma GCC unroll 4
    for (int j = 0; j < Vecs; ++j) row[j] = Vec::load(b + k * b_stride + j * Vec::lanes);
#pragma GCC unroll 24
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
#pragma GCC unroll 24
    for (int i = 0; i < Rows; ++i) {
      const PairVec x = PairVec::broadcast(a + i * row_stride + k * depth_stride);
#pragma GCC unroll 4
      for (int j = 0; j < Vecs; ++j) acc[i][j] = dot(x, row[j], acc[i][j]);
    }
  }
}
#endif

// ---- Operands, or pairs of them, in lanes

// A vector of them from up to `count` elements; the others are 0.
template <class T>
inline __attribute__((always_inline)) Vec load_operands(const T* p, int64_t count, float*) {
  return count >= Vec::lanes ? Vec::load(p) : Vec::load(p, int(count));
}
// acc + a * b; of pairs, both products.
inline Vec multiply_operands(Vec a, Vec b, Vec acc, float*) {
  return fma(a, b, acc);
}
#ifdef PYTRANSFORMER_BF16_DOT
inline __attribute__((always_inline)) Vec load_operands(const bfloat16* p, int64_t count, bfloat16*) {
  if (count >= 2 * Vec::lanes) return Vec::load(reinterpret_cast<const float*>(p));
  float pairs[Vec::lanes] = {};
  __builtin_memcpy(pairs, p, size_t(count) * sizeof *p);
  return Vec::load(pairs);
}
inline Vec multiply_operands(Vec a, Vec b, Vec acc, bfloat16*) {
  return dot(PairVec::of_bits(a), PairVec::of_bits(b), acc);
}
#endif

// low, high = the lanes of a and b taken alternately: a0 b0 a1 b1 ...
inline __attribute__((always_inline)) void interleave(Vec a, Vec b, Vec& low, Vec& high) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = {_mm512_permutex2var_ps(a.v, first, b.v)};
  high = {_mm512_permutex2var_ps(a.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b.v)};
#elif defined(__AVX2__)
  const __m256 even = _mm256_unpacklo_ps(a.v, b.v), odd = _mm256_unpackhi_ps(a.v, b.v);
  low = {_mm256_permute2f128_ps(even, odd, 0x20)};
  high = {_mm256_permute2f128_ps(even, odd, 0x31)};
#elif defined(PYTRANSFORMER_NEON)
  low = {vzip1q_f32(a.v, b.v)};
  high = {vzip2q_f32(a.v, b.v)};
#else
  low = {float4{a.v[0], b.v[0], a.v[1], b.v[1]}};
  high = {float4{a.v[2], b.v[2], a.v[3], b.v[3]}};
#endif
}

// Transposes a square of lanes x lanes. Interleaving the upper with the lower half of the rows rotates
// the bits of (row, lane) by one place; after log2(lanes) times row and lane have changed places.
inline __attribute__((always_inline)) void transpose(Vec (&square)[Vec::lanes]) {
  constexpr int half = Vec::lanes / 2;
#pragma GCC unroll 4
  for (int done = 1; done < Vec::lanes; done *= 2) {
    Vec next[Vec::lanes];
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) interleave(square[i], square[i + half], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < Vec::lanes; ++i) square[i] = next[i];
  }
}

// Lane i is the sum of the lanes of v[i]. Interleaving two vectors and adding the halves leaves one vector of both:
// half the shuffles of adding up each by itself. `v` is overwritten.
inline __attribute__((always_inline)) Vec sums_of_lanes(Vec (&v)[Vec::lanes]) {
#pragma GCC unroll 4
  for (int half = Vec::lanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      Vec low, high;
      interleave(v[i], v[i + half], low, high);
      v[i] = low + high;
    }
  }
  return v[0];
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
