#include "attention.h"

#include <pybind11/stl.h>

#include <optional>

#include "bindings.h"
#include "call.h"
#include "check.h"

namespace py = pybind11;

namespace pytransformer {
namespace {

void check_heads(const TensorView& view, const TensorView& like, int64_t b, int64_t h, int64_t length, int64_t width,
                 const char* name) {
  PYTRANSFORMER_CHECK(view.ndim == 4 && view.dtype == like.dtype && view.shape[0] == b && view.shape[1] == h &&
                          view.shape[2] == length && view.shape[3] == width &&
                          (view.stride[3] == 1 || view.shape[3] <= 1),
                      "attention: ", name, " must be [", b, ",", h, ",", length, ",", width, "] of dtype ",
                      name_of(like.dtype), " with unit stride in the last dimension");
}

void check_pages(const AttentionProblem& a) {
  const TensorView &q = a.query, &k = a.key, &table = a.block_table;
  PYTRANSFORMER_CHECK(table.dtype == DType::int32 && table.ndim == 2 && table.shape[0] == q.shape[0] &&
                          (table.stride[1] == 1 || table.shape[1] <= 1),
                      "attention: block_table must be int32 [B,P] with unit stride in the last dimension");
  PYTRANSFORMER_CHECK(!a.mask && !a.bias && a.dropout_p == 0, "attention: pages are read without mask, bias, dropout");
  PYTRANSFORMER_CHECK(a.at_end && !a.cu_seq_q, "attention: with pages the band counts from the end of each sequence");
  PYTRANSFORMER_CHECK(k.shape[1] > 0 && q.shape[1] / k.shape[1] * q.shape[2] <= most_paged_rows,
                      "attention: pages are read for up to ", most_paged_rows, " queries a key head");
}

#ifndef PYTRANSFORMER_CUDA_MODULE
// A longer sequence than was said would not fit into what is allocated for the longest.
void check_lengths(const TensorView& cu_seq, int64_t longest, const char* name) {
  const int32_t* begin = cu_seq.ptr<const int32_t>();
  for (int64_t n = 0; n + 1 < cu_seq.shape[0]; ++n) {
    PYTRANSFORMER_CHECK(begin[0] >= 0 && begin[n] <= begin[n + 1] && begin[n + 1] - begin[n] <= longest,
                        "attention: ", name, " must never fall, and rise by at most ", longest);
  }
}
#endif

void check_packing(const AttentionProblem& a) {
  for (const TensorView* t : {&a.cu_seq_q, &a.cu_seq_k}) {
    PYTRANSFORMER_CHECK(
        t->dtype == DType::int32 && t->ndim == 1 && t->shape[0] == a.query.shape[0] + 1 && t->contiguous(),
        "attention: cu_seq_q and cu_seq_k must be contiguous int32 [B+1]");
  }
#ifndef PYTRANSFORMER_CUDA_MODULE  // what lies in a GPU's memory is not looked at
  check_lengths(a.cu_seq_q, a.query.shape[2], "cu_seq_q");
  check_lengths(a.cu_seq_k, a.key.shape[2], "cu_seq_k");
#endif
  PYTRANSFORMER_CHECK(!a.mask && !a.bias && !a.key_lengths,
                      "attention: sequences end to end are read without mask, bias and key_lengths");
}

void check_problem(const AttentionProblem& a) {
  const TensorView &q = a.query, &k = a.key, &v = a.value;
  PYTRANSFORMER_CHECK(q.ndim == 4 && k.ndim == 4 && v.ndim == 4, "attention: query, key, value must be 4-dimensional");
  const int64_t first = a.block_table ? k.shape[0] : q.shape[0];
  check_heads(q, q, q.shape[0], q.shape[1], q.shape[2], q.shape[3], "query");
  check_heads(k, q, first, k.shape[1], k.shape[2], q.shape[3], "key");
  check_heads(v, q, first, k.shape[1], k.shape[2], v.shape[3], "value");
  if (a.block_table) check_pages(a);
  if (a.cu_seq_q || a.cu_seq_k) check_packing(a);
  PYTRANSFORMER_CHECK(k.shape[1] > 0 ? q.shape[1] % k.shape[1] == 0 : q.shape[1] == 0,
                      "attention: query heads must be a multiple of key heads");
  for (const TensorView* t : {&a.mask, &a.bias}) {
    PYTRANSFORMER_CHECK(!*t || (t->ndim == 4 && t->shape[0] == q.shape[0] && t->shape[1] == q.shape[1] &&
                                t->shape[2] == q.shape[2] && t->shape[3] == k.shape[2]),
                        "attention: mask and bias must be expanded to [B,H,T,S]");
  }
  PYTRANSFORMER_CHECK(!a.mask || a.mask.dtype == DType::boolean, "attention: mask must be bool");
  PYTRANSFORMER_CHECK(!a.key_lengths || (a.key_lengths.dtype == DType::int64 && a.key_lengths.ndim == 1 &&
                                         a.key_lengths.shape[0] == q.shape[0] && a.key_lengths.contiguous()),
                      "attention: key_lengths must be contiguous int64 [B]");
}

void check_lse(const TensorView& lse, const AttentionProblem& a) {
  const TensorView& q = a.query;
  const bool shaped =
      lse.ndim == 3 && lse.shape[0] == q.shape[0] && lse.shape[1] == q.shape[1] && lse.shape[2] == q.shape[2];
  PYTRANSFORMER_CHECK(lse.dtype == DType::float32 && shaped && (a.cu_seq_q ? lse.stride[2] == 1 : lse.contiguous()),
                      "attention: lse must be contiguous float32 [B,H,T]");
}

AttentionProblem problem(const TensorView& query, const TensorView& key, const TensorView& value,
                         const TensorView& mask, const TensorView& bias, const TensorView& key_lengths,
                         std::optional<int64_t> band_lower, std::optional<int64_t> band_upper, float scale,
                         float softcap, float dropout_p, const TensorView& block_table, const TensorView& cu_seq_q,
                         const TensorView& cu_seq_k, bool at_end, const Call& call) {
  AttentionProblem a{query,
                     key,
                     value,
                     mask,
                     bias,
                     key_lengths,
                     band_lower.value_or(unbounded_lower),
                     band_upper.value_or(unbounded_upper),
                     scale,
                     softcap,
                     dropout_p,
                     call.seed(),
                     call.offset(),
                     block_table,
                     cu_seq_q,
                     cu_seq_k,
                     at_end};
  check_problem(a);
  return a;
}

void forward(const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& mask,
             const TensorView& bias, const TensorView& key_lengths, std::optional<int64_t> band_lower,
             std::optional<int64_t> band_upper, float scale, float softcap, float dropout_p,
             const TensorView& block_table, const TensorView& cu_seq_q, const TensorView& cu_seq_k, bool at_end,
             const TensorView& out, const TensorView& lse, const Call& call) {
  const AttentionProblem a = problem(query, key, value, mask, bias, key_lengths, band_lower, band_upper, scale, softcap,
                                     dropout_p, block_table, cu_seq_q, cu_seq_k, at_end, call);
  const TensorView& q = a.query;
  check_heads(out, q, q.shape[0], q.shape[1], q.shape[2], a.value.shape[3], "out");
  check_lse(lse, a);
  call(PYTRANSFORMER_KERNEL(attention_fwd), AttentionForward{a, out, lse});
}

void backward(const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& mask,
              const TensorView& bias, const TensorView& key_lengths, std::optional<int64_t> band_lower,
              std::optional<int64_t> band_upper, float scale, float softcap, float dropout_p,
              const TensorView& cu_seq_q, const TensorView& cu_seq_k, bool at_end, const TensorView& out,
              const TensorView& lse, const TensorView& grad_out, const TensorView& grad_query,
              const TensorView& grad_key, const TensorView& grad_value, const TensorView& grad_bias, const Call& call) {
  const AttentionProblem a = problem(query, key, value, mask, bias, key_lengths, band_lower, band_upper, scale, softcap,
                                     dropout_p, {}, cu_seq_q, cu_seq_k, at_end, call);
  const TensorView &q = a.query, &k = a.key, &v = a.value;
  const int64_t B = q.shape[0], H = q.shape[1], T = q.shape[2], G = k.shape[1], S = k.shape[2];
  check_heads(out, q, B, H, T, v.shape[3], "out");
  check_heads(grad_out, q, B, H, T, v.shape[3], "grad_out");
  check_heads(grad_query, q, B, H, T, q.shape[3], "grad_query");
  check_heads(grad_key, q, B, G, S, q.shape[3], "grad_key");
  check_heads(grad_value, q, B, G, S, v.shape[3], "grad_value");
  check_lse(lse, a);
  PYTRANSFORMER_CHECK(!grad_bias || (a.bias && grad_bias.dtype == DType::float32 && grad_bias.ndim == 4 &&
                                     grad_bias.contiguous() && grad_bias.numel() == B * H * T * S),
                      "attention: grad_bias must be contiguous float32 [B,H,T,S]");
  call(PYTRANSFORMER_KERNEL(attention_bwd),
       AttentionBackward{a, out, lse, grad_out, grad_query, grad_key, grad_value, grad_bias});
}

#ifdef PYTRANSFORMER_CUDA_MODULE

// Of the backward, where an lse is given.
int64_t workspace(const TensorView& query, const TensorView& key, const TensorView& value, const TensorView& mask,
                  const TensorView& block_table, const TensorView& cu_seq_q, const TensorView& cu_seq_k,
                  float dropout_p, const TensorView& lse) {
  AttentionProblem a{query, key, value, mask};
  a.dropout_p = dropout_p;
  a.block_table = block_table;
  a.cu_seq_q = cu_seq_q;
  a.cu_seq_k = cu_seq_k;
  a.at_end = bool(block_table);
  check_problem(a);
  if (!lse) return cuda::attention_fwd_workspace(a);
  check_lse(lse, a);
  AttentionBackward backward{a};
  backward.lse = lse;
  return cuda::attention_bwd_workspace(backward);
}

#endif

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention_fwd", &forward);
  module.def("attention_bwd", &backward);
#ifdef PYTRANSFORMER_CUDA_MODULE
  module.def("attention_workspace", &workspace, "Bytes of workspace that a call needs.");
#endif
}

}  // namespace pytransformer
