// The module pytransformer._cuda.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "device.h"
#include "tensor_caster.h"

namespace py = pybind11;

namespace {

py::dict report() {
  const pytransformer::DeviceReport report = pytransformer::report_devices();
  py::list devices;
  for (const auto& device : report.devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory_bytes"] = device.memory_bytes;
    devices.append(entry);
  }
  py::dict result;
  result["devices"] = devices;
  result["error"] = report.error;
  result["runtime_version"] = report.runtime_version;
  result["driver_version"] = report.driver_version;
  return result;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  pytransformer::load_exchange_api();
  module.doc() = "CUDA kernels. Private: use pytransformer.ops.";
  module.def("report_devices", &report, "Devices, versions, and why there is no device where there is none.");
  module.def(
      "multiprocessors",
      [](int device) {
        const pytransformer::cuda::DeviceGuard guard(device);
        return pytransformer::cuda::multiprocessors();
      },
      py::arg("device"));
  pytransformer::bind_attention(module);
  pytransformer::bind_embedding(module);
  pytransformer::bind_ffn(module);
  pytransformer::bind_layer_norm(module);
  pytransformer::bind_linear_cross_entropy(module);
}
