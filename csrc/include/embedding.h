// embedding: output[n] = dropout(sum over tables of scale * rows[index[n]])
//
// output [N,E]. The tables are tokens, positions and segments, all of the output's type and contiguous [rows,E];
// index is int64 [N] in [0, rows), or absent: then row n takes rows[n mod rows], as positions do for each sequence
// of a batch.
#pragma once

#include "tensor_view.h"

namespace pytransformer {

struct EmbeddingTable {
  TensorView rows, index;
  float scale = 1;
};

struct EmbeddingForward {
  EmbeddingTable tokens, positions, segments;  // the last two optional
  TensorView output;
  uint64_t seed = 0, offset = 0;
  float dropout_p = 0;
};

// Gradients of the tables, in place of their rows; written where they are defined.
struct EmbeddingBackward {
  TensorView grad_output;
  EmbeddingTable tokens, positions, segments;
  uint64_t seed = 0, offset = 0;
  float dropout_p = 0;
};

}  // namespace pytransformer
