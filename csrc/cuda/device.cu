// Queries of the CUDA runtime. The runtime is linked statically and loads the driver when first asked,
// so the module imports on a machine without one; any error here means "no device", never a crash.
#include <cuda_runtime.h>

#include "device.h"

namespace pytransformer {

DeviceReport report_devices() {
  DeviceReport report;
  cudaRuntimeGetVersion(&report.runtime_version);
  if (cudaDriverGetVersion(&report.driver_version) != cudaSuccess) report.driver_version = 0;
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    report.error = cudaGetErrorString(error);
    cudaGetLastError();  // clears it, so that a later launch does not find it
    return report;
  }
  if (count == 0) report.error = "no CUDA device";
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) {
      cudaGetLastError();
      continue;
    }
    report.devices.push_back({properties.name, properties.major, properties.minor, properties.multiProcessorCount,
                              properties.totalGlobalMem});
  }
  return report;
}

}  // namespace pytransformer
