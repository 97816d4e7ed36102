// ffn: hidden = input weight1^T + bias1;  output = dropout(activation(hidden)) weight2^T + bias2
//
// input [N,E], weight1 [F,E], weight2 [O,F] (nn.Linear's layout), all contiguous and of one type;
// biases of that type or float32.
#pragma once

#include "tensor_view.h"

namespace pytransformer {

enum class Activation : int32_t { relu, gelu, gelu_tanh, silu };

struct FfnForward {
  TensorView input, weight1, bias1, weight2, bias2;  // biases optional
  TensorView output;                                 // [N,O]
  TensorView hidden;  // [N,F] before the activation; written where it is defined (for the backward)
  Activation activation = Activation::relu;
  uint64_t seed = 0, offset = 0;
  float dropout_p = 0;
};

struct FfnBackward {
  TensorView grad_output, input, weight1, weight2, hidden;
  // Written where they are defined. grad_bias1 and grad_bias2 are float32.
  TensorView grad_input, grad_weight1, grad_bias1, grad_weight2, grad_bias2;
  Activation activation = Activation::relu;
  uint64_t seed = 0, offset = 0;
  float dropout_p = 0;
};

}  // namespace pytransformer
