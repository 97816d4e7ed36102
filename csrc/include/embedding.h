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

// The gradient of one table, grad [parts,rows,E], from tokens sorted by the row they take: row r is `scale` times the
// sum of grad_output[order[i]] after dropout for ends[r] <= i < ends[r + 1], each part a share of that range. Without
// order and ends row r takes rows r, r + rows, r + 2 rows, ... of grad_output.
struct EmbeddingTableBackward {
  TensorView grad_output;  // [N,E]
  TensorView order, ends;  // int64 [N] and [rows + 1], or absent both
  TensorView grad;         // of the type of grad_output or float32
  float scale = 1;
  float dropout_p = 0;
};

}  // namespace pytransformer
