// C = A B with wgmma: a warpgroup multiplies tiles that lie in shared memory, two stages deep, filled by cp.async.
//
// A is [M, K], B is [K, N], both bfloat16 and row-major, C float32; K, M and N multiples of 64. A block computes 64
// x 64. A tile is 64 rows of 128 bytes, the chunks of 16 bytes permuted by the row (the swizzle of 128 bytes); rows of
// A run along K, rows of B along N, which the descriptor calls MN-major. Copies are made by the generic proxy and wgmma
// reads by the async one, so that every thread fences its copies before the barrier.
#include <cuda_bf16.h>

#include <cstdint>

namespace {

constexpr int tile = 64, stages = 2, tile_bytes = tile * 128;

__device__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
// 64 rows of 128 bytes from row `row0`, column `column0` of a matrix of `width` columns.
__device__ void fetch(uint32_t to, const __nv_bfloat16* from, int row0, int column0, int width) {
  for (int i = threadIdx.x; i < tile * 8; i += 128) {
    const int row = i >> 3, chunk = i & 7;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + row * 128 + ((chunk ^ (row & 7)) << 4)),
                 "l"(from + int64_t(row0 + row) * width + column0 + chunk * 8)
                 : "memory");
  }
}
// Where an operand begins; 1,024 bytes from one group of eight rows to the next; the swizzle of 128 bytes.
__device__ uint64_t descriptor(uint32_t at) {
  return uint64_t(at >> 4 & 0x3fff) | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
      "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, "
      "1, 0, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128)
    matmul_warpgroup(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int N, int K) {
  __shared__ __align__(1024) uint8_t a_tiles[stages][tile_bytes];
  __shared__ __align__(1024) uint8_t b_tiles[stages][tile_bytes];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, row0 = blockIdx.y * tile, column0 = blockIdx.x * tile;
  const auto fill = [&](int k0, int stage) {
    fetch(shared_address(a_tiles[stage]), A, row0, k0, K);
    fetch(shared_address(b_tiles[stage]), B, k0, column0, N);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  float sums[32] = {};
  fill(0, 0);
  for (int k0 = 0; k0 < K; k0 += tile) {
    const int stage = k0 / tile % stages;
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();  // the stage is full
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int k = 0; k < tile; k += 16) {
      multiply(sums, descriptor(shared_address(a_tiles[stage]) + k * 2),
               descriptor(shared_address(b_tiles[stage]) + k * 128));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    __syncthreads();  // the products of the stage before are done: it may be overwritten
    if (k0 + tile < K) fill(k0 + tile, stage ^ 1);
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int n = 0; n < 8; ++n) {
    float* const out = C + (row0 + 16 * warp + (lane >> 2)) * N + column0 + 8 * n + (lane & 3) * 2;
    *reinterpret_cast<float2*>(out) = make_float2(sums[4 * n], sums[4 * n + 1]);
    *reinterpret_cast<float2*>(out + 8 * N) = make_float2(sums[4 * n + 2], sums[4 * n + 3]);
  }
}
