// What the benchmarks ask of the compiled module: the machine's own peak.
#include "bindings.h"
#include "kernels.h"

namespace py = pybind11;

namespace pytransformer {

void bind_peak(py::module_& module) {
  module.def(
      "peak_rate",
      [](bool paired, double seconds) {
        py::gil_scoped_release released;
        return kernels().peak_rate(paired, seconds);
      },
      py::arg("paired"), py::arg("seconds"),
      "Operations a second of all threads: float32 multiply-adds, or dot products of bfloat16 pairs (0 without them).");
}

}  // namespace pytransformer
