// ffn: hidden = input weight1^T + bias1;  output = dropout(activation(hidden) * gate) weight2^T + bias2
//
// gate = input weight_gate^T + bias_gate, or 1 where there is no weight_gate.
// input [N,E], weight1 and weight_gate [F,E], weight2 [O,F] (nn.Linear's layout), all contiguous and of one type;
// biases of that type or float32.
#pragma once

#include "tensor_view.h"

namespace pytransformer {

enum class Activation : int32_t { relu, gelu, gelu_tanh, silu };

struct FfnForward {
  TensorView input, weight1, bias1, weight2, bias2, weight_gate, bias_gate;  // biases and gate optional
  TensorView output;                                                         // [N,O]
  TensorView hidden;  // [N,F] before the activation; written where it is defined (for the backward)
  Activation activation = Activation::relu;
  uint64_t seed = 0, offset = 0;
  float dropout_p = 0;
};

struct FfnBackward {
  TensorView grad_output, input, weight1, weight2, weight_gate, bias_gate, hidden;
  // Written where they are defined. The gradients of biases are float32.
  TensorView grad_input, grad_weight1, grad_bias1, grad_weight2, grad_bias2, grad_weight_gate, grad_bias_gate;
  Activation activation = Activation::relu;
  uint64_t seed = 0, offset = 0;
  float dropout_p = 0;
};

// What lies between the products, where they are a library's: activated = dropout(activation(hidden) * gate).
// All are contiguous [N,F] of one type; the gate is optional.
struct FfnActivationForward {
  TensorView hidden, gate, activated;
  Activation activation = Activation::relu;
  float dropout_p = 0;
};

// From the gradient of `activated`: `activated` again, the gradients of hidden and gate, and their column sums.
struct FfnActivationBackward {
  TensorView grad_activated, hidden, gate;
  TensorView activated, grad_hidden, grad_gate;  // written; grad_gate where there is a gate
  TensorView grad_bias, grad_bias_gate;          // float32 [F], written where they are defined
  Activation activation = Activation::relu;
  float dropout_p = 0;
};

}  // namespace pytransformer
