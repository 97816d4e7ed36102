// linear: output = input weight^T + bias
//
// input [N,E], weight [O,E] (nn.Linear's layout), contiguous and of one type; bias [O] of that type or float32.
#pragma once

#include "tensor_view.h"

namespace pytransformer {

struct LinearForward {
  TensorView input, weight, bias;  // bias optional
  TensorView output;               // [N,O]
};

struct LinearBackward {
  TensorView grad_output, input, weight;
  // Written where they are defined. The gradient of the bias is float32.
  TensorView grad_input, grad_weight, grad_bias;
};

}  // namespace pytransformer
