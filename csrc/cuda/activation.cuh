// The activations of the feed-forward network and their derivatives, in float.
#pragma once

#include "ffn.h"
#include "launch.h"

namespace pytransformer::cuda {

struct Activated {
  float value, slope;
};

// Which activation is the same for a whole launch, so the branches diverge nowhere. What is not used is not computed.
inline __device__ Activated activate(Activation activation, float x) {
  constexpr float sqrt_half = 0.7071067811865476f, inverse_sqrt_2pi = 0.3989422804014327f;
  constexpr float sqrt_2_over_pi = 0.7978845608028654f, cubic = 0.044715f;
  if (activation == Activation::relu) return {x < 0 ? 0.0f : x, x > 0 ? 1.0f : 0.0f};
  if (activation == Activation::gelu) {
    const float below = 0.5f * (1.0f + erff(x * sqrt_half));
    return {x * below, below + x * (expf(-0.5f * x * x) * inverse_sqrt_2pi)};
  }
  if (activation == Activation::gelu_tanh) {
    const float square = x * x, th = tanhf(x * sqrt_2_over_pi * (1.0f + square * cubic));
    // Where the tanh has reached 1 the second term is 0, and its last factor may be infinite.
    const float bend = (1.0f - th) * (1.0f + th) * x;
    const float second = bend == 0 ? 0.0f : bend * ((1.0f + square * (3.0f * cubic)) * sqrt_2_over_pi);
    return {0.5f * x * (1.0f + th), 0.5f * (1.0f + th) + 0.5f * second};
  }
  const float gate = 1.0f / (1.0f + expf(-x));
  return {x * gate, gate * (1.0f + x * (1.0f - gate))};
}

}  // namespace pytransformer::cuda
