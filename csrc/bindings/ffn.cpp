#include "ffn.h"

#include <string>

#include "bindings.h"
#include "call.h"
#include "check.h"
#include "ffn_activation.h"

namespace py = pybind11;

namespace pytransformer {
namespace {

void check_matrix(const TensorView& view, const TensorView& like, int64_t rows, int64_t columns, const char* name) {
  PYTRANSFORMER_CHECK(!view || (view.ndim == 2 && view.contiguous() && view.dtype == like.dtype &&
                                view.shape[0] == rows && view.shape[1] == columns),
                      "ffn: ", name, " must be contiguous [", rows, ",", columns, "] of dtype ", name_of(like.dtype));
}

void check_vector(const TensorView& view, int64_t size, const char* name) {
  PYTRANSFORMER_CHECK(!view || (view.ndim == 1 && view.contiguous() && view.shape[0] == size), "ffn: ", name,
                      " must be contiguous [", size, "]");
}

void forward(const Rows& input, const TensorView& weight1, const TensorView& bias1, const TensorView& weight2,
             const TensorView& bias2, const TensorView& weight_gate, const TensorView& bias_gate,
             const std::string& activation, float dropout_p, const Rows& output, const Rows& hidden, const Call& call) {
  const int64_t N = input.shape[0], E = input.shape[1], F = weight1.shape[0], O = weight2.shape[0];
  check_matrix(input, input, N, E, "input");
  check_matrix(weight1, input, F, E, "weight1");
  check_matrix(weight2, input, O, F, "weight2");
  check_matrix(output, input, N, O, "output");
  check_matrix(hidden, input, N, F, "hidden");
  check_vector(bias1, F, "bias1");
  check_vector(bias2, O, "bias2");
  check_matrix(weight_gate, input, F, E, "weight_gate");
  check_vector(bias_gate, F, "bias_gate");
  const FfnForward a{input,       weight1,       bias1,    weight2, bias2,
                     weight_gate, bias_gate,     output,   hidden,  activation_from(activation),
                     call.seed(), call.offset(), dropout_p};
  call(PYTRANSFORMER_KERNEL(ffn_fwd), a);
}

void backward(const Rows& grad_output, const Rows& input, const TensorView& weight1, const TensorView& weight2,
              const TensorView& weight_gate, const TensorView& bias_gate, const Rows& hidden,
              const std::string& activation, float dropout_p, const Rows& grad_input, const TensorView& grad_weight1,
              const TensorView& grad_bias1, const TensorView& grad_weight2, const TensorView& grad_bias2,
              const TensorView& grad_weight_gate, const TensorView& grad_bias_gate, const Call& call) {
  const int64_t N = input.shape[0], E = input.shape[1], F = weight1.shape[0], O = weight2.shape[0];
  check_matrix(input, input, N, E, "input");
  check_matrix(weight1, input, F, E, "weight1");
  check_matrix(weight2, input, O, F, "weight2");
  check_matrix(hidden, input, N, F, "hidden");
  check_matrix(grad_output, input, N, O, "grad_output");
  check_matrix(grad_input, input, N, E, "grad_input");
  check_matrix(grad_weight1, input, F, E, "grad_weight1");
  check_matrix(grad_weight2, input, O, F, "grad_weight2");
  check_vector(grad_bias1, F, "grad_bias1");
  check_vector(grad_bias2, O, "grad_bias2");
  check_matrix(weight_gate, input, F, E, "weight_gate");
  check_vector(bias_gate, F, "bias_gate");
  check_matrix(grad_weight_gate, input, F, E, "grad_weight_gate");
  check_vector(grad_bias_gate, F, "grad_bias_gate");
  const FfnBackward a{grad_output,  input,         weight1,          weight2,        weight_gate,
                      bias_gate,    hidden,        grad_input,       grad_weight1,   grad_bias1,
                      grad_weight2, grad_bias2,    grad_weight_gate, grad_bias_gate, activation_from(activation),
                      call.seed(),  call.offset(), dropout_p};
  call(PYTRANSFORMER_KERNEL(ffn_bwd), a);
}

}  // namespace

void bind_ffn(py::module_& module) {
  module.def("ffn_fwd", &forward);
  module.def("ffn_bwd", &backward);
}

}  // namespace pytransformer
