// attention: out = dropout(softmax(softcap(scale * query key^T) + bias, over what the masks leave)) value
//
// query [B,H,T,D], key [B,G,S,D], value [B,G,S,Dv] with H a multiple of G; any strides whose last is 1.
// Query head h reads key/value head h / (H / G). Key s is visible to query t iff all of these hold:
//     band_lower <= s - t <= band_upper      (causal and window; unbounded_* where absent)
//     s < key_lengths[b]                     (int64 [B])
//     mask[b,h,t,s]                          (bool [B,H,T,S]; stride 0 in broadcast dimensions)
// bias is [B,H,T,S], of the inputs' type or float32, stride 0 in broadcast dimensions. softcap(s) is
// c tanh(s / c) for softcap = c > 0, and s for 0. Dropout draws its bits by the index of a score in [B,H,T,S].
// A query that sees no key has output 0, lse -inf and no gradients; what lies behind a mask is never
// used, NaN and Inf included.
//
// Pages. With a block_table, int32 [B,P] of unit stride, key and value are pools [pages,G,page,D] and
// [pages,G,page,Dv]: key s of sequence b is row s % page of page block_table[b][s / page], and S = P * page. Only
// entries of keys that some query sees are read. Pages are for the forward of few queries, without mask, bias and
// dropout.
//
// Sequences end to end. With cu_seq_q and cu_seq_k, int32 [B+1], sequence b is the queries cu_seq_q[b] to
// cu_seq_q[b + 1] and the keys cu_seq_k[b] to cu_seq_k[b + 1] of tensors that hold all sequences in their dimension of
// rows. Such a tensor comes as a view [B,H,T,D] with T the longest sequence and stride 0 from sequence to sequence:
// row t of sequence b lies cu_seq[b] + t rows from its beginning. What lies like the queries is query, out, lse and
// their gradients. There is no mask, no bias and no key_lengths then.
//
// at_end: the band counts from the end of each sequence, the last query standing at the last key. That is, the band is
// one of s - (keys - queries + t), with the sequence's own numbers of keys (key_lengths[b], if given) and of queries.
// It must be so with pages, and may be with sequences end to end.
#pragma once

#include <cstdint>
#include <limits>

#include "tensor_view.h"

namespace pytransformer {

constexpr int64_t unbounded_lower = std::numeric_limits<int64_t>::min();
constexpr int64_t unbounded_upper = std::numeric_limits<int64_t>::max();

struct AttentionProblem {
  TensorView query, key, value;
  TensorView mask, bias, key_lengths;  // optional
  int64_t band_lower = unbounded_lower, band_upper = unbounded_upper;
  float scale = 1, softcap = 0, dropout_p = 0;
  uint64_t seed = 0, offset = 0;
  TensorView block_table;         // optional
  TensorView cu_seq_q, cu_seq_k;  // optional, both or none
  bool at_end = false;

  int64_t key_count() const { return block_table ? block_table.shape[1] * key.shape[2] : key.shape[2]; }
};

// Queries that share a key/value head, at most, where keys and values lie in pages.
constexpr int64_t most_paged_rows = 64;

struct AttentionForward : AttentionProblem {
  TensorView out;  // [B,H,T,Dv], last stride 1
  TensorView lse;  // float32 [B,H,T]: natural logarithm of the sum of exponentials; contiguous, or end to end
};

struct AttentionBackward : AttentionProblem {
  TensorView out, lse, grad_out;
  TensorView grad_query, grad_key, grad_value;  // shaped as query, key, value; last stride 1
  TensorView grad_bias;  // optional; float32 [B,H,T,S]: not summed over the dimensions in which bias broadcasts
};

}  // namespace pytransformer
