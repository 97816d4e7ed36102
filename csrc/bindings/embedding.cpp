#include "embedding.h"

#include <string>

#include "bindings.h"
#include "call.h"
#include "check.h"

namespace py = pybind11;

namespace pytransformer {
namespace {

void check_matrix(const TensorView& view, const TensorView& like, const char* name) {
  PYTRANSFORMER_CHECK(
      !view || (view.ndim == 2 && view.contiguous() && view.dtype == like.dtype && view.shape[1] == like.shape[1]),
      "embedding: ", name, " must be contiguous [rows,", like.shape[1], "] of dtype ", name_of(like.dtype));
}

void check_batch(const TensorView& view, const char* name) {
  PYTRANSFORMER_CHECK(stored(view.dtype), "embedding: ", name, " must be float32, float16 or bfloat16, got ",
                      name_of(view.dtype));
  check_matrix(view, view, name);
}

void check_table(const EmbeddingTable& table, const TensorView& batch, const char* name) {
  check_matrix(table.rows, batch, name);
  if (!table.rows) return;
  const int64_t N = batch.shape[0], rows = table.rows.shape[0];
  if (!table.index) {
    PYTRANSFORMER_CHECK(N == 0 || rows > 0, "embedding: ", name, " has no rows");
    return;
  }
  PYTRANSFORMER_CHECK(table.index.ndim == 1 && table.index.contiguous() && table.index.dtype == DType::int64 &&
                          table.index.shape[0] == N,
                      "embedding: the indices of ", name, " must be contiguous int64 [", N, "]");
  const int64_t* index = table.index.ptr<const int64_t>();
  for (int64_t n = 0; n < N; ++n) {
    if (index[n] >= 0 && index[n] < rows) continue;
    throw py::index_error("embedding: " + std::string(name) + " must be in [0, " + std::to_string(rows) + "), got " +
                          std::to_string(index[n]) + " at " + std::to_string(n));
  }
}

void forward(const TensorView& weight, const TensorView& tokens, float scale, const Rows& positions,
             const TensorView& position_index, const TensorView& segment_weight, const TensorView& segments,
             float dropout_p, const Rows& output, const Call& call) {
  const EmbeddingForward a{{weight, tokens, scale},
                           {positions, position_index, 1},
                           {segment_weight, segments, 1},
                           output,
                           call.seed(),
                           call.offset(),
                           dropout_p};
  check_batch(output, "output");
  check_table(a.tokens, output, "tokens");
  check_table(a.positions, output, "positions");
  check_table(a.segments, output, "segments");
  call(PYTRANSFORMER_KERNEL(embedding_fwd), a);
}

void backward(const Rows& grad_output, const TensorView& tokens, float scale, const TensorView& position_index,
              const TensorView& segments, float dropout_p, const TensorView& grad_weight, const Rows& grad_positions,
              const TensorView& grad_segment_weight, const Call& call) {
  const EmbeddingBackward a{grad_output,
                            {grad_weight, tokens, scale},
                            {grad_positions, position_index, 1},
                            {grad_segment_weight, segments, 1},
                            call.seed(),
                            call.offset(),
                            dropout_p};
  check_batch(grad_output, "grad_output");
  check_table(a.tokens, grad_output, "tokens");
  check_table(a.positions, grad_output, "positions");
  check_table(a.segments, grad_output, "segments");
  call(PYTRANSFORMER_KERNEL(embedding_bwd), a);
}

}  // namespace

void bind_embedding(py::module_& module) {
  module.def("embedding_fwd", &forward);
  module.def("embedding_bwd", &backward);
}

}  // namespace pytransformer
