// Queries of the CUDA runtime. The runtime is linked statically and loads the driver when first asked,
// so the module imports on a machine without one; any error here means "no device", never a crash.
#include <cuda_runtime.h>

#include "device.h"

#include "check.h"

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

namespace cuda {
namespace {

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("pytransformer: ") + call + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr wanted) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, wanted, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

int compute_capability() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}

int multiprocessors() {
  return attribute(cudaDevAttrMultiProcessorCount);
}

int l2_bytes() {
  return attribute(cudaDevAttrL2CacheSize);
}

}  // namespace cuda
}  // namespace pytransformer
