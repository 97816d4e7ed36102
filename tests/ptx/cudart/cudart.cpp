// A stand-in for the CUDA runtime, under the host code that nvcc compiled: launches go to the runner.
//
// nvcc's host code registers each kernel's name with the address of its host stub; a launch looks the name up, has the
// kernel translated when it is the first, and runs it to its end before it returns. Device memory is the host's. What
// hardware would refuse is refused: too many threads, more shared memory than was asked for or than there is. Only what
// host code of this library may call is here; anything else is missing at link time, which tells by name.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <driver_types.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <unordered_map>

namespace ptx {
struct Image;
}

extern "C" {
const ptx::Image* ptx_find(const char* name);
int ptx_recorded(const char* name, size_t dynamic_bytes);
int ptx_launch(const ptx::Image* image, const uint32_t* grid, const uint32_t* threads, size_t dynamic_bytes,
               void* const* arguments);
uint32_t ptx_static_shared(const ptx::Image* image);
uint32_t ptx_max_threads(const ptx::Image* image);
int ptx_capability();
int ptx_multiprocessors();
int ptx_encode_tensor_map(void* to, uint32_t type, uint32_t rank, uint64_t base, const uint64_t* size,
                          const uint64_t* stride, const uint32_t* box, uint32_t swizzle_row);
}

namespace {

struct Kernel {
  std::string name;
  size_t dynamic_limit = 48 << 10;  // until cudaFuncSetAttribute raises it
};

std::unordered_map<const void*, Kernel>& kernels() {
  static std::unordered_map<const void*, Kernel> all;
  return all;
}

thread_local cudaError_t last_error = cudaSuccess;
// Whether this thread has a context: the first call that needs one binds it, and functions of the driver want it.
thread_local bool context = false;

cudaError_t failed(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

size_t shared_per_block() {
  return (ptx_capability() >= 90 ? 227 : 163) << 10;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local Configuration pushed;

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared) {
  context = true;
  const auto found = kernels().find(function);
  if (found == kernels().end()) return failed(cudaErrorInvalidDeviceFunction);
  if (shared > found->second.dynamic_limit) return failed(cudaErrorInvalidValue);
  if (ptx_recorded(found->second.name.c_str(), shared)) return cudaSuccess;
  const ptx::Image* const image = ptx_find(found->second.name.c_str());
  if (image == nullptr) return failed(cudaErrorInvalidKernelImage);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z, blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > ptx_max_threads(image) || blocks == 0 || grid.y > 65535 || grid.z > 65535) {
    return failed(cudaErrorInvalidConfiguration);
  }
  if (shared + ptx_static_shared(image) > found->second.dynamic_limit) return failed(cudaErrorInvalidValue);
  const uint32_t grid_size[] = {grid.x, grid.y, grid.z}, block_size[] = {block.x, block.y, block.z};
  return failed(ptx_launch(image, grid_size, block_size, shared, arguments) ? cudaErrorInvalidValue : cudaSuccess);
}

}  // namespace

// What nvcc's host code calls without being asked.
extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[stub].name = name;
}
// Constants stand in the translated kernel; copies to symbols are not offered.
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared);
}

// The one function of the driver's that is asked for, as far as the runner knows such maps.
static CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                  const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                  const cuuint32_t* step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                  CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  bool known = interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle <= CU_TENSOR_MAP_SWIZZLE_128B &&
               fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  for (cuuint32_t d = 0; d < rank; ++d) known = known && step[d] == 1;
  const auto address = reinterpret_cast<uint64_t>(base);
  const bool refused = !known || ptx_encode_tensor_map(map, type, rank, address, size, stride, box, 16u << swizzle);
  return refused ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

// What it calls by name.
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool found = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *function = found ? reinterpret_cast<void*>(encode_tensor_map) : nullptr;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return launch(function, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return failed(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > shared_per_block()) return failed(cudaErrorInvalidValue);
  found->second.dynamic_limit = value;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const auto found = kernels().find(function);
  const ptx::Image* const image = found == kernels().end() ? nullptr : ptx_find(found->second.name.c_str());
  if (image == nullptr) return failed(cudaErrorInvalidDeviceFunction);
  std::memset(attributes, 0, sizeof *attributes);
  attributes->sharedSizeBytes = ptx_static_shared(image);
  attributes->maxThreadsPerBlock = ptx_max_threads(image);
  attributes->maxDynamicSharedSizeBytes = found->second.dynamic_limit;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t shared,
                                                                   unsigned) {
  *blocks = std::min<size_t>(2048 / threads, shared ? (shared_per_block() + 1024) / shared : 32);
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() {
  return last_error;
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorInvalidKernelImage: return "device kernel image is invalid";
    default: return "unknown error";
  }
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  return *version = CUDART_VERSION, cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  return *version = CUDART_VERSION, cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  return *count = 1, cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  return *device = 0, cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  context = device == 0;
  return failed(context ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = ptx_multiprocessors(); break;
    case cudaDevAttrL2CacheSize: *value = 96 << 10; break;  // holds some of a test's heads, not all
    case cudaDevAttrComputeCapabilityMajor: *value = ptx_capability() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = ptx_capability() % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(shared_per_block()); break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    default: return failed(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  std::memset(properties, 0, sizeof *properties);
  std::snprintf(properties->name, sizeof properties->name, "PTX runner, sm_%d", ptx_capability());
  properties->major = ptx_capability() / 10;
  properties->minor = ptx_capability() % 10;
  properties->multiProcessorCount = ptx_multiprocessors();
  properties->sharedMemPerBlockOptin = shared_per_block();
  properties->maxThreadsPerBlock = 1024;
  properties->warpSize = 32;
  properties->totalGlobalMem = size_t(1) << 30;
  return cudaSuccess;
}
}
