#include "linear.h"

#include "bindings.h"
#include "call.h"
#include "check.h"

namespace py = pybind11;

namespace pytransformer {
namespace {

void check_matrix(const TensorView& view, const TensorView& like, int64_t rows, int64_t columns, const char* name) {
  PYTRANSFORMER_CHECK(!view || (view.ndim == 2 && view.contiguous() && view.dtype == like.dtype &&
                                view.shape[0] == rows && view.shape[1] == columns),
                      "linear: ", name, " must be contiguous [", rows, ",", columns, "] of dtype ",
                      name_of(like.dtype));
}

void check_bias(const TensorView& view, int64_t size, const char* name) {
  PYTRANSFORMER_CHECK(!view || (view.ndim == 1 && view.contiguous() && view.shape[0] == size), "linear: ", name,
                      " must be contiguous [", size, "]");
}

void forward(const Rows& input, const TensorView& weight, const TensorView& bias, const Rows& output,
             const Call& call) {
  const int64_t N = input.shape[0], E = input.shape[1], O = weight.shape[0];
  check_matrix(input, input, N, E, "input");
  check_matrix(weight, input, O, E, "weight");
  check_matrix(output, input, N, O, "output");
  check_bias(bias, O, "bias");
  call(PYTRANSFORMER_KERNEL(linear_fwd), LinearForward{input, weight, bias, output});
}

void backward(const Rows& grad_output, const Rows& input, const TensorView& weight, const Rows& grad_input,
              const TensorView& grad_weight, const TensorView& grad_bias, const Call& call) {
  const int64_t N = input.shape[0], E = input.shape[1], O = weight.shape[0];
  check_matrix(input, input, N, E, "input");
  check_matrix(weight, input, O, E, "weight");
  check_matrix(grad_output, input, N, O, "grad_output");
  check_matrix(grad_input, input, N, E, "grad_input");
  check_matrix(grad_weight, input, O, E, "grad_weight");
  check_bias(grad_bias, O, "grad_bias");
  call(PYTRANSFORMER_KERNEL(linear_bwd),
       LinearBackward{grad_output, input, weight, grad_input, grad_weight, grad_bias});
}

}  // namespace

void bind_linear(py::module_& module) {
  module.def("linear_fwd", &forward);
  module.def("linear_bwd", &backward);
}

}  // namespace pytransformer
