#include "layer_norm.h"

#include "bindings.h"
#include "call.h"
#include "check.h"

namespace py = pybind11;

namespace pytransformer {
namespace {

void check_rows(const TensorView& view, const TensorView& like, const char* name) {
  PYTRANSFORMER_CHECK(view.ndim == 2 && view.contiguous() && view.dtype == like.dtype &&
                          view.shape[0] == like.shape[0] && view.shape[1] == like.shape[1],
                      "layer_norm: ", name, " must be contiguous [rows, columns] of dtype ", name_of(like.dtype));
}

// A parameter is of the input's dtype or float32, a statistic or a gradient float32.
void check_vector(const TensorView& view, int64_t size, DType dtype, const char* name) {
  PYTRANSFORMER_CHECK(!view || (view.ndim == 1 && view.contiguous() && view.shape[0] == size &&
                                (view.dtype == dtype || view.dtype == DType::float32)),
                      "layer_norm: ", name, " must be contiguous [", size, "] of dtype ", name_of(dtype),
                      " or float32");
}

void forward(const Rows& input, const TensorView& weight, const TensorView& bias, const Rows& residual,
             const TensorView& input_bias, float dropout_p, float eps, bool rms, const Rows& output, const Rows& sum,
             const TensorView& mean, const TensorView& rstd, const Call& call) {
  check_rows(input, input, "input");
  check_rows(output, input, "output");
  if (residual) check_rows(residual, input, "residual");
  if (sum) check_rows(sum, input, "sum");
  check_vector(weight, input.shape[1], input.dtype, "weight");
  check_vector(bias, input.shape[1], input.dtype, "bias");
  check_vector(input_bias, input.shape[1], input.dtype, "input_bias");
  check_vector(mean, input.shape[0], DType::float32, "mean");
  check_vector(rstd, input.shape[0], DType::float32, "rstd");
  const LayerNormForward problem{input, weight, bias,        residual,      input_bias, output, sum,
                                 mean,  rstd,   call.seed(), call.offset(), dropout_p,  eps,    rms};
  call(PYTRANSFORMER_KERNEL(layer_norm_fwd), problem);
}

void backward(const Rows& grad_output, const Rows& grad_sum, const Rows& sum, const TensorView& weight,
              const TensorView& mean, const TensorView& rstd, float dropout_p, bool rms, const Rows& grad_residual,
              const Rows& grad_input, const TensorView& grad_weight, const TensorView& grad_bias,
              const TensorView& grad_input_bias, const Call& call) {
  check_rows(sum, sum, "sum");
  check_rows(grad_output, sum, "grad_output");
  check_rows(grad_residual, sum, "grad_residual");
  if (grad_sum) check_rows(grad_sum, sum, "grad_sum");
  if (grad_input) check_rows(grad_input, sum, "grad_input");
  check_vector(weight, sum.shape[1], sum.dtype, "weight");
  check_vector(grad_weight, sum.shape[1], DType::float32, "grad_weight");
  check_vector(grad_bias, sum.shape[1], DType::float32, "grad_bias");
  check_vector(grad_input_bias, sum.shape[1], DType::float32, "grad_input_bias");
  check_vector(mean, sum.shape[0], DType::float32, "mean");
  check_vector(rstd, sum.shape[0], DType::float32, "rstd");
  const LayerNormBackward problem{
      grad_output, grad_sum,        sum,         weight,        mean,      rstd, grad_residual, grad_input, grad_weight,
      grad_bias,   grad_input_bias, call.seed(), call.offset(), dropout_p, rms};
  call(PYTRANSFORMER_KERNEL(layer_norm_bwd), problem);
}

}  // namespace

void bind_layer_norm(py::module_& module) {
  module.def("layer_norm_fwd", &forward);
  module.def("layer_norm_bwd", &backward);
}

}  // namespace pytransformer
