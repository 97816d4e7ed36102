// How the host starts a kernel. Every launch is checked, and what fails says which kernel, on what and in what shape:
//
//     layer_norm_fwd: CUDA kernel not launched on bfloat16 [4096,768], grid [4096,1,1] of [1024,1,2] threads, 0 bytes
//     of shared memory: invalid configuration argument
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <type_traits>

#include "check.h"
#include "kernels.h"

namespace pytransformer::cuda {

struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic shared memory
};

constexpr size_t shared_without_asking = 48 * 1024;

inline std::ostream& operator<<(std::ostream& out, dim3 size) {
  return out << '[' << size.x << ',' << size.y << ',' << size.z << ']';
}

inline std::ostream& operator<<(std::ostream& out, const TensorView& view) {
  out << name_of(view.dtype) << " [";
  for (int i = 0; i < view.ndim; ++i) out << (i > 0 ? "," : "") << view.shape[i];
  return out << ']';
}

[[noreturn]] inline void launch_failed(const char* name, const TensorView& of, const Shape& shape, cudaError_t error) {
  cudaGetLastError();  // clears it, so that a later launch does not find it
  std::ostringstream message;
  message << name << ": CUDA kernel not launched on " << of << ", grid " << shape.grid << " of " << shape.block
          << " threads, " << shape.shared_bytes << " bytes of shared memory: " << cudaGetErrorString(error);
  throw std::runtime_error(message.str());
}

// Starts `kernel` with `arguments`; `name` and `of`, the tensor that tells the problem's size, are for the error.
template <class... Parameters>
void start(const char* name, const TensorView& of, void (*kernel)(Parameters...), const Shape& shape,
           const Launch& launch, const std::common_type_t<Parameters>&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shape.shared_bytes > shared_without_asking) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes));
    if (error != cudaSuccess) launch_failed(name, of, shape, error);
  }
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  const cudaError_t error =
      cudaLaunchKernel(function, shape.grid, shape.block, pointers, shape.shared_bytes, launch.stream);
  if (error != cudaSuccess) launch_failed(name, of, shape, error);
}

// body(value of the storage type) for the types that `dtype` may be: by_dtype<float, __half>("op", dtype, ...).
template <class... Types, class Body>
void by_dtype(const char* name, DType dtype, const Body& body) {
  const auto is = [dtype](auto value) {
    using T = decltype(value);
    if (std::is_same_v<T, float>) return dtype == DType::float32;
    if (std::is_same_v<T, __half>) return dtype == DType::float16;
    return std::is_same_v<T, __nv_bfloat16> && dtype == DType::bfloat16;
  };
  const bool found = ((is(Types{}) && (body(Types{}), true)) || ...);
  if (!found) fail(name, ": no CUDA kernel for ", name_of(dtype));
}

// Stops where the caller brought less scratch memory, or fewer counters, than the kernel writes.
inline void check_workspace(const char* name, const Launch& launch, int64_t bytes, int64_t counters) {
  const TensorView& memory = launch.workspace;
  const int64_t brought = memory ? memory.numel() * size_of(memory.dtype) : 0;
  if (brought < bytes) fail(name, ": workspace must have ", bytes, " bytes, got ", brought);
  const int64_t zeros = launch.counters ? launch.counters.numel() : 0;
  if (zeros < counters) fail(name, ": counters must be at least ", counters, ", got ", zeros);
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline bool aligned(const TensorView& view, size_t bytes) {
  return !view || reinterpret_cast<uintptr_t>(view.data) % bytes == 0;
}

}  // namespace pytransformer::cuda
