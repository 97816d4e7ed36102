// Kernels that the runner is tested with: each leans on one way in which threads act together.
//
// What is right here is broken on purpose by tests/ptx/test_faults.py, which replaces lines of this file.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

// y = a x + y, one element to a thread.
extern "C" __global__ void axpy(const float* x, float* y, float a, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = a * x[i] + y[i];
}

// The sum of each row: shuffles within a warp, shared memory between warps.
extern "C" __global__ void row_sums(const float* x, float* sums, int columns) {
  __shared__ float partial[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += x[blockIdx.x * columns + i];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = lane < blockDim.x / 32 ? partial[lane] : 0.0f;
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) sums[blockIdx.x] = sum;
  }
}

// The sum of everything in one launch: each block writes its part, the last one to finish adds the parts in order.
extern "C" __global__ void last_block_sum(const float* x, float* parts, unsigned* finished, float* total, int n) {
  __shared__ float row[128];
  __shared__ bool last;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  row[threadIdx.x] = i < n ? x[i] : 0.0f;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) row[threadIdx.x] += row[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = row[0];
    __threadfence();  // before: the part is written; after: it is counted
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
    __threadfence();  // before: all have been counted; after: their parts are read
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float sum = 0.0f;
    for (int b = 0; b < gridDim.x; ++b) sum += parts[b];
    *total = sum;
    *finished = 0;
  }
}

// Rotates the rows of a tile by a pipeline of two warps: one fills, one empties, by named barriers.
extern "C" __global__ void hand_over(const int* x, int* y, int rounds) {
  __shared__ int tile[2][32];
  const int lane = threadIdx.x & 31, producer = threadIdx.x < 32;
  for (int r = 0; r < rounds; ++r) {
    const int slot = r & 1;
    if (producer) {
      if (r >= 2) asm volatile("bar.sync %0, 64;" ::"r"(3 + slot) : "memory");  // the slot is empty
      tile[slot][lane] = x[32 * r + lane];
      asm volatile("bar.arrive %0, 64;" ::"r"(1 + slot) : "memory");  // the slot is full
    } else {
      asm volatile("bar.sync %0, 64;" ::"r"(1 + slot) : "memory");
      y[32 * r + lane] = tile[slot][(lane + 1) & 31];
      if (r + 2 < rounds) asm volatile("bar.arrive %0, 64;" ::"r"(3 + slot) : "memory");
    }
  }
}

// Everything that rounds: conversions, approximate functions, pairs of 16-bit floats, Philox's wide products.
extern "C" __global__ void numbers(const float* x, const int* k, float* y, __nv_bfloat162* pairs, uint32_t* words) {
  const int t = threadIdx.x;
  const float v = x[t];
  float exponential;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exponential) : "f"(v));
  y[8 * t + 0] = exponential;
  y[8 * t + 1] = tanhf(v);
  y[8 * t + 2] = erff(v);
  y[8 * t + 3] = expf(v);
  y[8 * t + 4] = __half2float(__float2half_rn(v));
  y[8 * t + 5] = __bfloat162float(__float2bfloat16_rn(v));
  y[8 * t + 6] = float(k[t] / 7) + float(k[t] % 7) + float(unsigned(k[t]) / 5u);
  y[8 * t + 7] = rsqrtf(fabsf(v)) + logf(fabsf(v)) + sqrtf(fabsf(v)) + v / 3.0f;
  const __nv_bfloat162 pair = __floats2bfloat162_rn(v, -v);
  pairs[t] = __hfma2(pair, pair, __floats2bfloat162_rn(1.0f, 0.25f));
  words[4 * t + 0] = __umulhi(0xD2511F53u, unsigned(k[t]));
  words[4 * t + 1] = __popc(k[t]) + __clz(k[t]) + __ffs(k[t]);
  words[4 * t + 2] = __byte_perm(k[t], t, 0x5140) ^ __funnelshift_l(k[t], t, 7);
  words[4 * t + 3] = __ballot_sync(~0u, v > 0.0f) + (__any_sync(~0u, v > 3.0f) ? 1u << t : 0u);
}
