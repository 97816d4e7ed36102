// The names of the activations.
#pragma once

#include <string>

#include "check.h"
#include "ffn.h"

namespace pytransformer {

inline Activation activation_from(const std::string& name) {
  if (name == "relu") return Activation::relu;
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "silu") return Activation::silu;
  fail("ffn: activation must be relu, gelu, gelu_tanh or silu; got '", name, "'");
}

}  // namespace pytransformer
