// Matrices added to one in memory by the copy engine (cp.reduce), a tile at a time, from two slots in turn. A tile has
// 32 rows of 128 bytes, swizzled as the map says; what lies beyond the matrix goes nowhere.
#include <cuda.h>

#include <cstdint>

namespace {

constexpr int slots = 2, tile_rows = 32, tile_bytes = tile_rows * 128, threads = 128;

__device__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

}  // namespace

// out += the matrices, [count,rows,32] of float32; a block adds 32 rows of each.
extern "C" __global__ void __launch_bounds__(threads)
    add_matrices(const __grid_constant__ CUtensorMap out, const float* matrices, int count, int rows) {
  __shared__ __align__(1024) uint8_t tile[slots][tile_bytes];
  const int row0 = blockIdx.x * tile_rows;
  for (int i = 0; i < count; ++i) {
    uint8_t* const slot = tile[i % slots];
    if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    __syncthreads();  // the slot has been read
    for (int at = threadIdx.x; at < tile_rows * 32; at += threads) {
      const int row = at / 32, column = at % 32;
      const float x = row0 + row < rows ? matrices[(i * rows + row0 + row) * 32 + column] : 0.0f;
      *reinterpret_cast<float*>(slot + row * 128 + ((column / 4 ^ row % 8) * 16) + column % 4 * 4) = x;
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();  // the slot is full
    if (threadIdx.x == 0) {
      asm volatile(
          "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&out),
          "r"(0), "r"(row0), "r"(shared_address(slot))
          : "memory");
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
  if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
