// The CUDA module's part of linear_cross_entropy: the losses of rows whose logits torch has computed.
#include "bindings.h"
#include "call.h"
#include "check.h"
#include "linear_cross_entropy.h"

namespace py = pybind11;

namespace pytransformer {
namespace {

void check_vector(const TensorView& view, int64_t size, DType dtype, const char* name) {
  PYTRANSFORMER_CHECK(view.ndim == 1 && view.contiguous() && view.dtype == dtype && view.shape[0] == size,
                      "linear_cross_entropy: ", name, " must be contiguous [", size, "] of dtype ", name_of(dtype));
}

void rows(const TensorView& logits, const TensorView& target, int64_t ignore_index, float label_smoothing, float z_loss,
          float softcap, const TensorView& row_scale, const TensorView& loss, const TensorView& lse, const Call& call) {
  PYTRANSFORMER_CHECK(logits.ndim == 2 && logits.stride[1] == 1, "linear_cross_entropy: logits must be rows [n,V]");
  const int64_t n = logits.shape[0];
  check_vector(target, n, DType::int64, "target");
  check_vector(loss, n, DType::float32, "loss");
  check_vector(lse, n, DType::float32, "lse");
  if (row_scale) check_vector(row_scale, row_scale.numel() == 1 ? 1 : n, DType::float32, "row_scale");
  const CrossEntropyRows problem{logits, target,    loss,
                                 lse,    row_scale, {ignore_index, label_smoothing, z_loss, softcap}};
  call(cuda::cross_entropy_rows, problem);
}

}  // namespace

void bind_linear_cross_entropy(py::module_& module) {
  module.def("cross_entropy_rows", &rows);
}

}  // namespace pytransformer
