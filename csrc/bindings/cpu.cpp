// The module pytransformer._cpu.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "interrupt.h"
#include "kernels.h"
#include "tensor_caster.h"

namespace py = pybind11;
using namespace pytransformer;

PYBIND11_MODULE(_cpu, module) {
  load_exchange_api();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const Interrupted&) {  // what the handler of the signal has raised is set already
    }
  });
  module.doc() = "SIMD kernels for CPUs. Private: use pytransformer.ops.";
  module.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
  module.def("set_isa", &set_isa, py::arg("name"), "Use the named instruction set from now on.");
  module.def(
      "isa_status",
      [] {
        py::dict status;
        for (const IsaStatus& isa : isa_status()) status[py::str(isa.name)] = isa.supported;
        return status;
      },
      "Every instruction set that was built, best last: does this CPU run it?");
  bind_attention(module);
  bind_embedding(module);
  bind_ffn(module);
  bind_large_memory(module);
  bind_layer_norm(module);
  bind_linear(module);
  bind_linear_cross_entropy(module);
  bind_peak(module);
}
