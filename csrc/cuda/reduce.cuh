// Sums over threads and over blocks, in an order that depends on nothing but their number: equal inputs give equal
// bits.
#pragma once

#include "launch.h"
#include "ptx.cuh"

namespace pytransformer::cuda {

constexpr int warp_size = 32, most_warps = 32;
constexpr uint32_t whole_warp = 0xffffffffu;

inline __device__ float warp_sum(float x) {
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) x += __shfl_xor_sync(whole_warp, x, step);
  return x;
}

// Sums over threadIdx.x, for each threadIdx.y; blockDim.x is a multiple of the warp. Where a row has several warps, all
// of them call this, and meet at one barrier: two sums in a row need a scratch each, in shared memory.
template <int N>
__device__ void row_sums(float (&x)[N], float (*scratch)[most_warps]) {
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = warp_sum(x[n]);
  if (blockDim.x == warp_size) return;
  const int warps = blockDim.x / warp_size, first = threadIdx.y * warps;
  if (threadIdx.x % warp_size == 0) {
#pragma unroll
    for (int n = 0; n < N; ++n) scratch[n][first + threadIdx.x / warp_size] = x[n];
  }
  ptx::barrier(1 + threadIdx.y, blockDim.x);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    x[n] = 0;
    for (int i = 0; i < warps; ++i) x[n] += scratch[n][first + i];
  }
}

// Column sums over blocks within one launch. Each of `count` blocks leaves a row of partial sums in memory; the last
// block of a group to do so adds up the group's rows in order, and the last of these the groups' sums. Groups of about
// sqrt(count), so that one block never has to read more than some twenty rows. counters[0] counts the groups,
// counters[1 + group] the blocks of one; all are zero again when the launch ends.
struct BlockSums {
  float* partial = nullptr;  // [count][width]
  int* counters = nullptr;
  int width = 0, count = 0, group = 0;  // group: blocks in a group

  static __host__ __device__ int group_of(int count) {
    int group = 1;
    while (group * group < count) ++group;
    return group;
  }
  static __host__ __device__ int groups(int count) { return (count + group_of(count) - 1) / group_of(count); }
};

// Did all of `count` blocks arrive at this counter? True in every thread of the last one, which then sees what the
// others wrote before. The fences stand in the thread that counts: the barrier hands it the writes of its block, the
// fence hands them on.
inline __device__ bool last_to_arrive(int* counter, int count) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    __threadfence();
    last = atomicAdd(counter, 1) == count - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// The sum over `count` rows, `stride` apart, of one column. Past the L1 cache, which does not see other blocks' writes.
inline __device__ float sum_down(const float* column, int64_t stride, int count) {
  float total = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) total += __ldcg(column + i * stride);
  return total;
}

// Called by all threads of block `index` when its row of partial sums is written; out(column, sum) is called once for
// each column, by threads of one block.
template <class Out>
__device__ void sum_over_blocks(const BlockSums& s, int index, const Out& out) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  const int groups = (s.count + s.group - 1) / s.group, group = index / s.group, first = group * s.group;
  const int size = min(s.group, s.count - first);
  if (!last_to_arrive(s.counters + 1 + group, size)) return;
  float* sums = s.partial + int64_t(first) * s.width;
  for (int c = thread; c < s.width; c += threads) sums[c] = sum_down(sums + c, s.width, size);
  if (!last_to_arrive(s.counters, groups)) return;
  const int64_t stride = int64_t(s.group) * s.width;
  for (int c = thread; c < s.width; c += threads) out(c, sum_down(s.partial + c, stride, groups));
}

}  // namespace pytransformer::cuda
