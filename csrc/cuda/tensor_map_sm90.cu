// Makes tensor maps. Only the driver knows what stands in them; its function is asked for by name, so that this module
// is linked to no driver.
//
// Source: CUDA driver API, "Tensor Map Object Management".
#include "tensor_map.h"

#include <climits>

#include "launch.h"

namespace pytransformer::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder(const char* name) {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    constexpr const char* symbol = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion(symbol, &function, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint(symbol, &function, cudaEnableDefault, &result);
#endif
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  if (found == nullptr) {
    cudaGetLastError();  // clears it, so that a later launch does not find it
    throw std::runtime_error(std::string(name) + ": the driver has no cuTensorMapEncodeTiled");
  }
  return found;
}

// Functions of the driver want a context, which the runtime gives a thread at its first call that needs one; what this
// thread has called so far may be none of these.
void bind_context(const char* name) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(name) + ": no context of CUDA: " + cudaGetErrorString(error));
}

// A dimension of rows as a map has it. One that is broadcast, of stride 0, is of one entry there, and one of one entry,
// whose stride says nothing, has any stride that is allowed: entries must not overlap.
struct Dimension {
  cuuint64_t size, stride, least;  // strides in bytes

  Dimension(const Heads& x, int count, int64_t elements)
      : size(cuuint64_t(count)), stride(cuuint64_t(elements) * 2), least(cuuint64_t(x.width) * 2) {
    if (count > 1 && elements != 0) return;
    size = 1;
    stride = least;
  }
  bool fits() const { return least <= stride && stride < cuuint64_t(1) << 40; }
};

}  // namespace

TileMap tile_map(const char* name, const Heads& x, MapSize given, int tile_rows) {
  TileMap made{};
  if (given.rows < tile_rows || x.row == 0) return made;
  const Dimension rows(x, given.end_to_end ? INT_MAX : given.rows, x.row);
  const Dimension heads(x, given.heads, x.head), batches(x, given.batches, x.batch);
  if (!rows.fits() || !heads.fits() || !batches.fits()) return made;
  const cuuint64_t size[] = {cuuint64_t(x.width), rows.size, heads.size, batches.size};
  const cuuint64_t stride[] = {rows.stride, heads.stride, batches.stride};
  const cuuint32_t box[] = {64, cuuint32_t(tile_rows), 1, 1}, step[] = {1, 1, 1, 1};
  bind_context(name);
  const CUresult result = encoder(name)(&made.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, x.data, size, stride, box, step,
                                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fail(name, ": no tensor map of [", given.batches, ",", given.heads, ",", given.rows, ",", x.width,
         "] with strides of ", x.batch, ", ", x.head, " and ", x.row, " elements: driver error ", int(result));
  }
  made.there = true;
  return made;
}

}  // namespace pytransformer::cuda
