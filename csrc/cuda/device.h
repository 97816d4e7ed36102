// What the CUDA runtime says of this machine, and the choice of a device.
#pragma once

#include <string>
#include <vector>

namespace pytransformer {

struct DeviceProperties {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  size_t memory_bytes;
};

struct DeviceReport {
  std::vector<DeviceProperties> devices;
  std::string error;        // why there are no devices, in the runtime's words; empty where there are
  int runtime_version = 0;  // 1000 * major + 10 * minor
  int driver_version = 0;   // the newest runtime that the driver supports; 0 without a driver
};

// Never fails: on a machine without a driver the report has no devices and says why.
DeviceReport report_devices();

namespace cuda {

// Makes `device` the current one for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;  // the device to go back to; -1: nothing was changed
};

// Of the current device.
int compute_capability();  // 10 * major + minor
int multiprocessors();
int l2_bytes();

}  // namespace cuda
}  // namespace pytransformer
