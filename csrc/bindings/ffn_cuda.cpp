// The CUDA module's part of ffn: what lies between the products, which torch computes.
#include <string>

#include "bindings.h"
#include "call.h"
#include "check.h"
#include "ffn.h"
#include "ffn_activation.h"

namespace py = pybind11;

namespace pytransformer {
namespace {

void check_like(const TensorView& view, const TensorView& like, const char* name) {
  PYTRANSFORMER_CHECK(!view || (view.ndim == 2 && view.contiguous() && view.dtype == like.dtype &&
                                view.shape[0] == like.shape[0] && view.shape[1] == like.shape[1]),
                      "ffn: ", name, " must be contiguous [N,F] of dtype ", name_of(like.dtype), ", as hidden is");
}

void check_sums(const TensorView& view, int64_t size, const char* name) {
  PYTRANSFORMER_CHECK(
      !view || (view.ndim == 1 && view.contiguous() && view.shape[0] == size && view.dtype == DType::float32),
      "ffn: ", name, " must be contiguous float32 [", size, "]");
}

void forward(const TensorView& hidden, const TensorView& gate, const std::string& activation, float dropout_p,
             const TensorView& activated, const Call& call) {
  check_like(hidden, hidden, "hidden");
  check_like(gate, hidden, "gate");
  check_like(activated, hidden, "activated");
  const FfnActivationForward problem{hidden, gate, activated, activation_from(activation), dropout_p};
  call(cuda::ffn_activation_fwd, problem);
}

void backward(const TensorView& grad_activated, const TensorView& hidden, const TensorView& gate,
              const std::string& activation, float dropout_p, const TensorView& activated,
              const TensorView& grad_hidden, const TensorView& grad_gate, const TensorView& grad_bias,
              const TensorView& grad_bias_gate, const Call& call) {
  check_like(hidden, hidden, "hidden");
  check_like(grad_activated, hidden, "grad_activated");
  check_like(gate, hidden, "gate");
  check_like(activated, hidden, "activated");
  check_like(grad_hidden, hidden, "grad_hidden");
  check_like(grad_gate, hidden, "grad_gate");
  PYTRANSFORMER_CHECK(gate.defined == grad_gate.defined, "ffn: gate and grad_gate go together");
  check_sums(grad_bias, hidden.shape[1], "grad_bias");
  check_sums(grad_bias_gate, hidden.shape[1], "grad_bias_gate");
  const FfnActivationBackward problem{grad_activated, hidden,         gate,
                                      activated,      grad_hidden,    grad_gate,
                                      grad_bias,      grad_bias_gate, activation_from(activation),
                                      dropout_p};
  call(cuda::ffn_activation_bwd, problem);
}

}  // namespace

void bind_ffn(py::module_& module) {
  module.def("ffn_activation_fwd", &forward);
  module.def("ffn_activation_bwd", &backward);
}

}  // namespace pytransformer
