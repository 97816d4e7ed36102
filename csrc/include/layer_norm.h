// layer_norm: sum = residual + dropout(input + input_bias);  output = (sum - mean) * rstd * weight + bias
// RMSNorm is the same with mean = 0 and rstd = 1 / sqrt(mean(sum^2) + eps).
//
// Rows are contiguous: [rows, columns]. input, residual, sum and output share one storage type;
// weight, bias and input_bias are of that type or float32. Statistics are float32 [rows].
#pragma once

#include "tensor_view.h"

namespace pytransformer {

struct LayerNormForward {
  TensorView input, weight, bias, residual, input_bias;  // all but input optional
  TensorView output, sum, mean, rstd;                    // sum is written where it is defined; so are mean and rstd
  uint64_t seed = 0, offset = 0;
  float dropout_p = 0, eps = 0;
  bool rms = false;
};

struct LayerNormBackward {
  TensorView grad_output, grad_sum;    // grad_sum optional: what reaches `sum` from elsewhere
  TensorView sum, weight, mean, rstd;  // weight optional
  TensorView grad_residual;            // the gradient of sum: always written
  TensorView grad_input;               // grad_residual after dropout; written where it is defined
  // Column sums, float32, written where they are defined: the gradients of weight, bias, input_bias.
  TensorView grad_weight, grad_bias, grad_input_bias;
  uint64_t seed = 0, offset = 0;
  float dropout_p = 0;
  bool rms = false;
};

}  // namespace pytransformer
