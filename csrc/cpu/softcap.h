// Capping by the hyperbolic tangent: cap(x) = c tanh(x / c), as of logits and attention scores.
#pragma once

#include "simd.h"
#include "vec_math.h"

namespace pytransformer::PYTRANSFORMER_ISA {

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
