// The CUDA module's part of embedding. Indices are in device memory: the kernels check them.
#include "bindings.h"
#include "call.h"
#include "check.h"
#include "embedding.h"

namespace py = pybind11;

namespace pytransformer {
namespace {

void check_index(const TensorView& view, int64_t size, const char* name) {
  PYTRANSFORMER_CHECK(
      !view || (view.ndim == 1 && view.contiguous() && view.dtype == DType::int64 && view.shape[0] == size),
      "embedding: ", name, " must be contiguous int64 [", size, "]");
}

void check_matrix(const TensorView& view, const TensorView& like, const char* name) {
  PYTRANSFORMER_CHECK(
      !view || (view.ndim == 2 && view.contiguous() && view.dtype == like.dtype && view.shape[1] == like.shape[1]),
      "embedding: ", name, " must be contiguous [rows,", like.shape[1], "] of dtype ", name_of(like.dtype));
}

void check_table(const EmbeddingTable& table, const TensorView& output, const char* name) {
  check_matrix(table.rows, output, name);
  check_index(table.index, output.shape[0], name);
  PYTRANSFORMER_CHECK(!table.rows || table.rows.shape[0] > 0, "embedding: ", name, " has no rows");
}

void forward(const TensorView& weight, const TensorView& tokens, float scale, const TensorView& positions,
             const TensorView& position_index, const TensorView& segment_weight, const TensorView& segments,
             float dropout_p, const TensorView& output, const Call& call) {
  const EmbeddingForward problem{{weight, tokens, scale},
                                 {positions, position_index, 1},
                                 {segment_weight, segments, 1},
                                 output,
                                 call.seed(),
                                 call.offset(),
                                 dropout_p};
  check_matrix(output, output, "output");
  check_table(problem.tokens, output, "tokens");
  check_table(problem.positions, output, "positions");
  check_table(problem.segments, output, "segments");
  call(cuda::embedding_fwd, problem);
}

void table_backward(const TensorView& grad_output, const TensorView& order, const TensorView& ends, float scale,
                    float dropout_p, const TensorView& grad, const Call& call) {
  check_matrix(grad_output, grad_output, "grad_output");
  PYTRANSFORMER_CHECK(grad.ndim == 3 && grad.contiguous() && grad.shape[2] == grad_output.shape[1] &&
                          (grad.dtype == grad_output.dtype || grad.dtype == DType::float32),
                      "embedding: grad must be contiguous [parts,rows,", grad_output.shape[1], "] of dtype ",
                      name_of(grad_output.dtype), " or float32");
  PYTRANSFORMER_CHECK(order.defined == ends.defined, "embedding: order and ends go together");
  check_index(order, grad_output.shape[0], "order");
  check_index(ends, grad.shape[1] + 1, "ends");
  call(cuda::embedding_table_bwd, EmbeddingTableBackward{grad_output, order, ends, grad, scale, dropout_p});
}

}  // namespace

void bind_embedding(py::module_& module) {
  module.def("embedding_fwd", &forward);
  module.def("embedding_table_bwd", &table_backward);
}

}  // namespace pytransformer
