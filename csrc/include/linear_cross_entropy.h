// linear_cross_entropy: the loss of each row of input [N,E] under a linear classifier of V classes.
//
//     logits = cap(input weight^T + bias),  cap(x) = softcap * tanh(x / softcap), or x for softcap = 0
//     lse    = log sum_v exp(logits[v])
//     loss   = lse - (1 - e) * logits[target] - e / V * sum_v logits[v] + z_loss * lse^2,  e = label_smoothing
//
// input, weight [V,E] (nn.Linear's layout) and bias [V] are contiguous and of one type, target is int64 [N] in
// [0, V) or ignore_index. Rows with an ignored target are not computed: their loss and gradient are 0.
#pragma once

#include "tensor_view.h"

namespace pytransformer {

struct CrossEntropyOptions {
  int64_t ignore_index = -100;
  float label_smoothing = 0, z_loss = 0, softcap = 0;
};

// The gradients of sum_n grad_loss[n] * loss[n], written where they are defined; grad_bias is float32.
struct LinearCrossEntropyGradients {
  TensorView input, weight, bias;
  explicit operator bool() const { return input || weight || bias; }
};

struct LinearCrossEntropyForward {
  TensorView input, weight, bias, target;  // bias optional
  TensorView loss, lse;                    // float32 [N], written
  LinearCrossEntropyGradients grad;        // for grad_loss[n] = grad_loss
  float grad_loss = 1;
  CrossEntropyOptions options;
};

struct LinearCrossEntropyBackward {
  TensorView grad_loss;  // float32 [N]
  TensorView input, weight, bias, target;
  LinearCrossEntropyGradients grad;
  CrossEntropyOptions options;
};

// The losses of some rows whose logits [n,V] stand in memory, bias added and not yet capped, each row at a multiple of
// 16 bytes. With `row_scale` the logits become row_scale[n] * dloss[n] / dlogits in place.
struct CrossEntropyRows {
  TensorView logits, target;  // target int64 [n]
  TensorView loss, lse;       // float32 [n], written
  TensorView row_scale;       // float32 [n] or [1], or absent
  CrossEntropyOptions options;
};

}  // namespace pytransformer
