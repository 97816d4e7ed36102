// Elementary functions on Vec.
//
// exp2(x) = 2^n * 2^f with n the nearest integer and f in [-1/2, 1/2]; 2^f is a minimax polynomial
// of relative error 7.5e-5 (degree 3) or 7.5e-8 (degree 5). Degree 3 is a hundredth of a bfloat16 ulp
// (2^-9) and saves two of seven multiply-adds where the result is rounded to bfloat16 anyway.
// Valid for x <= 127; -inf and everything below -127 give 0, NaN gives NaN.
#pragma once

#include "simd.h"

namespace pytransformer::PYTRANSFORMER_ISA {

constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

// For x in [-126, 127], where the result is a normal number; elsewhere it is anything.
template <int Degree>
inline Vec exp2_normal(Vec x) {
  static_assert(Degree == 3 || Degree == 5, "no coefficients for this degree");
  const Vec n = round(x);
  const Vec f = x - n;
  Vec p;
  if constexpr (Degree == 3) {
    p = Vec::set1(0.05517167f);
    p = fma(p, f, Vec::set1(0.24261113f));
    p = fma(p, f, Vec::set1(0.69326097f));
    p = fma(p, f, Vec::set1(0.99992806f));
  } else {
    p = Vec::set1(0.0013276472f);
    p = fma(p, f, Vec::set1(0.009675541f));
    p = fma(p, f, Vec::set1(0.05550713f));
    p = fma(p, f, Vec::set1(0.2402212f));
    p = fma(p, f, Vec::set1(0.69314694f));
    p = fma(p, f, Vec::set1(1.0000001f));
  }
  return scale_by_power_of_two(p, n);
}

template <int Degree>
inline Vec exp2(Vec x) {
  return exp2_normal<Degree>(max(Vec::set1(-127.0f), x));  // in this order NaN passes through
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
