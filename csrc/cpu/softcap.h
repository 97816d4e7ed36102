// Capping by the hyperbolic tangent: cap(x) = c tanh(x / c), as of logits and attention scores.
//
// Where |x| < 0.625, tanh x = x + x z P(z) with z = x^2, a polynomial fitted for least relative error (4e-9):
// 1 - 2 / (e^2x + 1) would lose all digits there. Farther out it is what that formula gives.
#pragma once

#include "simd.h"
#include "vec_math.h"

namespace pytransformer::PYTRANSFORMER_ISA {

inline Vec tanh(Vec x) {
  const Vec one = Vec::set1(1.0f), size = min(Vec::set1(10.0f), abs(x));  // in this order NaN passes through
  const Vec e = exp2<6>(size * Vec::set1(2 * log2_e));
  const Vec far = one - Vec::set1(2.0f) / (e + one);
  const Vec z = x * x;
  Vec p = Vec::set1(-0.0057170447f);
  p = fma(p, z, Vec::set1(0.0206505861f));
  p = fma(p, z, Vec::set1(-0.0537434965f));
  p = fma(p, z, Vec::set1(0.133314908f));
  p = fma(p, z, Vec::set1(-0.333332837f));
  const Vec near = fma(x * z, p, x);
  return select(size < Vec::set1(0.625f), near, select(x < Vec::zero(), Vec::zero() - far, far));
}

struct Softcap {
  float cap;  // 0: none

  explicit operator bool() const { return cap > 0; }
  Vec value(Vec x) const { return Vec::set1(cap) * tanh(x / Vec::set1(cap)); }
  // The derivative, from the value.
  Vec slope(Vec value) const {
    const Vec t = value / Vec::set1(cap);
    return fnma(t, t, Vec::set1(1.0f));
  }
};

}  // namespace pytransformer::PYTRANSFORMER_ISA
