// Elementary functions on Vec.
//
// exp2(x) = 2^n * 2^f with n the nearest integer and f in [-1/2, 1/2]; 2^f is a minimax polynomial
// of relative error 7.5e-5 (degree 3), 7.5e-8 (degree 5) or 1.9e-9 (degree 6). Degree 3 is a hundredth of a
// bfloat16 ulp (2^-9), enough where the result is rounded to bfloat16 anyway. Degree 5 is off by half a
// float32 ulp, always the same way at a given f; degree 6 only by its rounding.
// Valid for x <= 127; -inf and everything below -127 give 0 or 2^-127 (a denormal, by instruction set), NaN
// gives NaN. Where many arguments lie so low, clamp first: arithmetic on denormals is slow.
#pragma once

#include "simd.h"

namespace pytransformer::PYTRANSFORMER_ISA {

constexpr float log2_e = 1.4426950408889634f;
constexpr float ln_2 = 0.6931471805599453f;

// 2^f of x = n + f.
template <int Degree>
inline Vec exp2_of_fraction(Vec x, Vec& n) {
  static_assert(Degree == 3 || Degree == 5 || Degree == 6, "no coefficients for this degree");
  n = round(x);
  const Vec f = x - n;
  Vec p;
  if constexpr (Degree == 3) {
    p = Vec::set1(0.05517167f);
    p = fma(p, f, Vec::set1(0.24261113f));
    p = fma(p, f, Vec::set1(0.69326097f));
    p = fma(p, f, Vec::set1(0.99992806f));
  } else if constexpr (Degree == 6) {
    p = Vec::set1(0.00015345812f);
    p = fma(p, f, Vec::set1(0.0013399931f));
    p = fma(p, f, Vec::set1(0.009618489f));
    p = fma(p, f, Vec::set1(0.055503286f));
    p = fma(p, f, Vec::set1(0.24022646f));
    p = fma(p, f, Vec::set1(0.6931472f));
    p = fma(p, f, Vec::set1(1.0f));
  } else {
    p = Vec::set1(0.0013276472f);
    p = fma(p, f, Vec::set1(0.009675541f));
    p = fma(p, f, Vec::set1(0.05550713f));
    p = fma(p, f, Vec::set1(0.2402212f));
    p = fma(p, f, Vec::set1(0.69314694f));
    p = fma(p, f, Vec::set1(1.0000001f));
  }
  return p;
}

// For x in [-126, 127], where the result is a normal number; elsewhere it is anything.
template <int Degree>
inline Vec exp2_normal(Vec x) {
  Vec n;
  const Vec p = exp2_of_fraction<Degree>(x, n);
  return scale_by_power_of_two(p, n);
}

// The same, and exactly 0 below: for what a mask turned to -inf, and because arithmetic on denormals is a hundred times
// slower.
template <int Degree>
inline Vec exp2_or_zero(Vec x) {
  Vec n;
  const Vec p = exp2_of_fraction<Degree>(x, n);
  return scale_by_power_of_two(p, n, not_less(x, Vec::set1(-126.0f)));
}

// The degree for a result that is rounded to T.
template <class T>
constexpr int exp_degree = 6;  // where half an ulp, always the same way, would be seen; else 5 serves
template <>
constexpr int exp_degree<float16> = 5;
template <>
constexpr int exp_degree<bfloat16> = 3;

template <class T>
constexpr int short_exp_degree = exp_degree<T> < 5 ? exp_degree<T> : 5;

template <int Degree>
inline Vec exp2(Vec x) {
  return exp2_normal<Degree>(max(Vec::set1(-127.0f), x));  // in this order NaN passes through
}

// `value` = 1 / (1 + e^-x) and `complement` = 1 - value, each with its relative accuracy in both tails: the
// exponential is taken of -|x|, so it never overflows. Below -87 it is 0, not a denormal, which would cost an assist.
struct Sigmoid {
  Vec value, complement;
};

// To the precision of T, as all that follow.
template <class T>
inline Sigmoid sigmoid(Vec x) {
  const Vec one = Vec::set1(1.0f), limit = Vec::set1(87.0f);
  const Vec z = min(limit, abs(x));  // in this order NaN passes through
  const Vec e = select(z >= limit, Vec::zero(), exp2<short_exp_degree<T>>(z * Vec::set1(-log2_e)));
  const Vec near = one / (one + e), far = e * near;
  const Mask negative = x < Vec::zero();
  return {select(negative, far, near), select(negative, near, far)};
}

// tanh x = (1 - e) / (1 + e) with e = e^(-2|x|), and near 0, where that cancels, x + x^3 P(x^2) with P
// fitted on |x| <= 0.7 for least relative error of the whole (4e-9).
inline Vec tanh(Vec x) {
  const Vec one = Vec::set1(1.0f), limit = Vec::set1(10.0f);
  const Vec z = min(limit, abs(x));  // in this order NaN passes through
  const Vec e = exp2<5>(z * Vec::set1(-2.0f * log2_e));
  const Vec far = (one - e) / (one + e);
  const Vec square = x * x;
  Vec p = Vec::set1(0.0018956674f);
  p = fma(p, square, Vec::set1(-0.00788331f));
  p = fma(p, square, Vec::set1(0.02157106f));
  p = fma(p, square, Vec::set1(-0.053920954f));
  p = fma(p, square, Vec::set1(0.13332984f));
  p = fma(p, square, Vec::set1(-0.33333325f));
  return select(z < Vec::set1(0.7f), fma(x * square, p, x), select(x < Vec::zero(), Vec::zero() - far, far));
}

// The standard normal distribution: `cumulative` = erfc(-x / sqrt 2) / 2 and `density` = e^(-x^2/2) / sqrt(2 pi).
//
// For the lower tail, erfc(z) = e^(-z^2) t P(t) with t = 1 / (1 + c z), fitted for least relative error
// (2.8e-8 up to z = 10; 3.5e-5 for 16 bits); for x > 0 it is taken from 1. Both share the exponential, whose argument
// keeps the rounding error of x^2 where fma is fused: at x = 10 it would cost 1e-5 of e^(-x^2/2), which 16 bits do not
// show. Beyond 12.5, where the tail is 1e-35, both are 0: products with what is left would soon be denormal, and slow.
struct NormalDistribution {
  Vec cumulative, density;
};

// a0 + a1 x + a2 x^2 + ...
template <size_t N>
inline Vec polynomial(Vec x, const float (&a)[N]) {
  Vec p = Vec::set1(a[N - 1]);
#pragma GCC unroll 16
  for (int i = int(N) - 2; i >= 0; --i) p = fma(p, x, Vec::set1(a[i]));
  return p;
}

template <class T>
inline NormalDistribution normal_distribution(Vec x) {
  constexpr bool exact = sizeof(T) == sizeof(float);
  const Vec one = Vec::set1(1.0f), limit = Vec::set1(12.5f), scale = Vec::set1(-0.5f * log2_e);
  const Vec z = min(limit, abs(x));  // in this order NaN passes through
  const Vec square = z * z;
  const Vec exponent = square * scale;
  Vec gauss = exp2<short_exp_degree<T>>(exponent);
  if constexpr (exact) {
    const Vec lost = fma(square, scale, Vec::zero() - exponent) + fma(z, z, Vec::zero() - square) * scale;
    gauss = fma(gauss, lost * Vec::set1(ln_2), gauss);
  }
  gauss = select(z >= limit, Vec::zero(), gauss);

  Vec t, p;
  if constexpr (exact) {
    t = one / fma(z, Vec::set1(0.26f), one);
    p = polynomial(t, {0.103757024f, 0.103050984f, 0.102788597f, 0.0519651845f, 0.158757836f, -0.147787899f,
                       0.248731852f, -0.151493728f, 0.0302301459f});
  } else {
    t = one / fma(z, Vec::set1(0.38f), one);
    p = polynomial(t, {0.151225224f, 0.157828599f, 0.0919825062f, 0.188872859f, -0.0899267122f});
  }
  const Vec tail = gauss * (t * p);
  return {select(x < Vec::zero(), tail, one - tail), gauss * Vec::set1(0.3989422804014327f)};
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
