// Sums over the threads that share a row, in an order that depends on nothing but their number.
#pragma once

#include "launch.h"

namespace pytransformer::cuda {

constexpr int warp_size = 32, most_warps = 32;
constexpr uint32_t whole_warp = 0xffffffffu;

inline __device__ float warp_sum(float x) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) x += __shfl_xor_sync(whole_warp, x, step);
  return x;
}

// The sum over threadIdx.x, for each threadIdx.y; blockDim.x is a multiple of the warp. Where a row has more than one
// warp, every thread of the block calls this. `scratch`, in shared memory, has a float for each warp of the block.
inline __device__ float row_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (blockDim.x == warp_size) return x;
  const int warps = blockDim.x / warp_size;
  float* row = scratch + threadIdx.y * warps;
  __syncthreads();  // what an earlier sum left has been read
  if (threadIdx.x % warp_size == 0) row[threadIdx.x / warp_size] = x;
  __syncthreads();
  float total = 0;
  for (int i = 0; i < warps; ++i) total += row[i];
  return total;
}

}  // namespace pytransformer::cuda
