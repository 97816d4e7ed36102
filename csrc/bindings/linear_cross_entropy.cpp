#include "linear_cross_entropy.h"

#include <string>

#include "bindings.h"
#include "call.h"
#include "check.h"

namespace py = pybind11;

namespace pytransformer {
namespace {

void check_matrix(const TensorView& view, const TensorView& like, int64_t rows, const char* name) {
  PYTRANSFORMER_CHECK(!view || (view.ndim == 2 && view.contiguous() && view.dtype == like.dtype &&
                                view.shape[0] == rows && view.shape[1] == like.shape[1]),
                      "linear_cross_entropy: ", name, " must be contiguous [", rows, ",", like.shape[1], "] of dtype ",
                      name_of(like.dtype));
}

void check_vector(const TensorView& view, int64_t size, DType dtype, const char* name) {
  PYTRANSFORMER_CHECK(!view || (view.ndim == 1 && view.contiguous() && view.dtype == dtype && view.shape[0] == size),
                      "linear_cross_entropy: ", name, " must be contiguous [", size, "] of dtype ", name_of(dtype));
}

void check_classifier(const TensorView& input, const TensorView& weight, const TensorView& bias,
                      const TensorView& target, const CrossEntropyOptions& options) {
  PYTRANSFORMER_CHECK(stored(input.dtype), "linear_cross_entropy: input must be float32, float16 or bfloat16, got ",
                      name_of(input.dtype));
  const int64_t N = input.shape[0], V = weight.shape[0];
  check_matrix(input, input, N, "input");
  check_matrix(weight, input, V, "weight");
  check_vector(bias, V, input.dtype, "bias");
  check_vector(target, N, DType::int64, "target");
  const int64_t* classes = target.ptr<const int64_t>();
  for (int64_t n = 0; n < N; ++n) {
    if (classes[n] == options.ignore_index || (classes[n] >= 0 && classes[n] < V)) continue;
    throw py::index_error("linear_cross_entropy: target must be in [0, " + std::to_string(V) +
                          ") or ignore_index = " + std::to_string(options.ignore_index) + ", got " +
                          std::to_string(classes[n]) + " in row " + std::to_string(n));
  }
}

void check_gradients(const LinearCrossEntropyGradients& grad, const TensorView& input, const TensorView& weight) {
  check_matrix(grad.input, input, input.shape[0], "grad_input");
  check_matrix(grad.weight, input, weight.shape[0], "grad_weight");
  check_vector(grad.bias, weight.shape[0], DType::float32, "grad_bias");
}

void forward(const Rows& input, const TensorView& weight, const TensorView& bias, const TensorView& target,
             int64_t ignore_index, float label_smoothing, float z_loss, float softcap, const TensorView& loss,
             const TensorView& lse, float grad_loss, const Rows& grad_input, const TensorView& grad_weight,
             const TensorView& grad_bias) {
  const LinearCrossEntropyForward a{input,
                                    weight,
                                    bias,
                                    target,
                                    loss,
                                    lse,
                                    {grad_input, grad_weight, grad_bias},
                                    grad_loss,
                                    {ignore_index, label_smoothing, z_loss, softcap}};
  check_classifier(input, weight, bias, target, a.options);
  check_vector(loss, input.shape[0], DType::float32, "loss");
  check_vector(lse, input.shape[0], DType::float32, "lse");
  check_gradients(a.grad, input, weight);
  const Running running;
  kernels().linear_cross_entropy_fwd(a);
}

void backward(const TensorView& grad_loss, const Rows& input, const TensorView& weight, const TensorView& bias,
              const TensorView& target, int64_t ignore_index, float label_smoothing, float z_loss, float softcap,
              const Rows& grad_input, const TensorView& grad_weight, const TensorView& grad_bias) {
  const LinearCrossEntropyBackward a{grad_loss,
                                     input,
                                     weight,
                                     bias,
                                     target,
                                     {grad_input, grad_weight, grad_bias},
                                     {ignore_index, label_smoothing, z_loss, softcap}};
  check_classifier(input, weight, bias, target, a.options);
  check_vector(grad_loss, input.shape[0], DType::float32, "grad_loss");
  check_gradients(a.grad, input, weight);
  const Running running;
  kernels().linear_cross_entropy_bwd(a);
}

}  // namespace

void bind_linear_cross_entropy(py::module_& module) {
  module.def("linear_cross_entropy_fwd", &forward);
  module.def("linear_cross_entropy_bwd", &backward);
}

}  // namespace pytransformer
