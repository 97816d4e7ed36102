// Sums of products as the tensor cores of Hopper (compute capability 9.0) make them.
//
// NVIDIA does not document this; what stands here gives every word that an H200 gave (silicon/), and no near relative
// of it does. The exact products and C are aligned to the largest exponent among them; of each, what lies more than 25
// bits below that exponent is cut off; the sum of the rest is exact, and is cut off to a float. An exponent is that of
// the operands: of a product the sum of two, though the significands may make it one more; a zero has none; a subnormal
// number has that of the smallest normal one (which the records show of C, but leave open of A and B). Nor do they show
// what becomes of a sum beyond float's range: infinity here.
#pragma once

#include "values.h"

namespace ptx::products {

constexpr int kept = 25;                                   // bits below the largest exponent
constexpr int of_zero = -1000, of_infinity_or_nan = 4000;  // in place of exponents: still far off when another is added

// GCC's vectors: eight columns of a matrix at once.
using Ints = int __attribute__((vector_size(32)));
using Longs = int64_t __attribute__((vector_size(64)));
using Doubles = double __attribute__((vector_size(64)));

template <int N>
struct Row {
  double x[N];
  int exponent[N];
};

template <int N>
inline Row<N> row(const float (&x)[N], int lowest_exponent) {
  Row<N> made;
  for (int n = 0; n < N; ++n) {
    const int magnitude = bits<int>(x[n]) & 0x7fffffff, exponent = (magnitude >> 23) - 127;
    made.x[n] = x[n];
    made.exponent[n] = magnitude == 0    ? of_zero
                       : exponent == 128 ? of_infinity_or_nan
                                         : std::max(exponent, lowest_exponent);
  }
  return made;
}

template <class V, class T, int N>
inline V vector(const T (&x)[N]) {
  static_assert(sizeof(V) == sizeof x);
  V v;
  std::memcpy(&v, x, sizeof v);
  return v;
}
inline Ints larger(Ints x, Ints y) {
  return x > y ? x : y;
}
inline Ints cut_off_to_integers(Doubles x) {
  return __builtin_convertvector(x, Ints);
}
inline Doubles power_of_two(Ints exponent) {
  return reinterpret_cast<Doubles>(__builtin_convertvector(exponent + 1023, Longs) << 52);
}

inline float cut_off(double x) {
  if (std::fabs(x) >= 0x1p-126) return float(bits<double>(bits<uint64_t>(x) & ~0x1fffffffull));
  if (x != x) return bits<float>(0x7fffffffu);
  return float(std::trunc(x * 0x1p149) * 0x1p-149);
}

template <int K>
inline double plain_sum(const Row<K>& a, const Row<8> (&B)[K], const Row<8>& c, int n) {
  double sum = c.x[n];
  for (int k = 0; k < K; ++k) sum += a.x[k] * B[k].x[n];
  return sum;
}

// d = a B + c. A term is below 2^(kept + 2), so that those of half of the products have room in an integer.
template <int K>
inline void add(const Row<K>& a, const Row<8> (&B)[K], const Row<8>& c, float (&d)[8]) {
  static_assert(K % 2 == 0 && K <= 16);
  Ints top = larger(vector<Ints>(c.exponent), Ints{} + of_zero / 2);
  for (int k = 0; k < K; ++k) top = larger(top, a.exponent[k] + vector<Ints>(B[k].exponent));
  const Doubles scale = power_of_two(kept - top);
  Ints even = {}, odd = cut_off_to_integers(vector<Doubles>(c.x) * scale);
  for (int k = 0; k < K; k += 2) {
    even += cut_off_to_integers(a.x[k] * vector<Doubles>(B[k].x) * scale);
    odd += cut_off_to_integers(a.x[k + 1] * vector<Doubles>(B[k + 1].x) * scale);
  }
  const Doubles sum = __builtin_convertvector(even, Doubles) + __builtin_convertvector(odd, Doubles);
  const Doubles scaled_back = sum * power_of_two(top - kept);
  for (int n = 0; n < 8; ++n) {
    const bool finite = top[n] < of_infinity_or_nan + of_zero;
    d[n] = cut_off(finite ? scaled_back[n] : plain_sum(a, B, c, n));
  }
}

}  // namespace ptx::products
