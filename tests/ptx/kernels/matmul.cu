// C = A B with mma.sync: tiles of A and B come by cp.async, two stages deep, and are read by ldmatrix.
//
// A is [M, K], B is [K, N], both bfloat16 and row-major, C float32; K a multiple of 32, M and N of 64. A block of four
// warps computes 64 x 64; a row of a tile is 64 bytes (A) or 128 (B), whose chunks of 16 bytes are permuted by the row,
// so that the eight rows that ldmatrix reads at once lie in different banks.
#include <cuda_bf16.h>

#include <cstdint>

namespace {

constexpr int tile = 64, depth = 32, stages = 2;

__device__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
__device__ uint32_t a_at(int row, int chunk) {
  return row * 64 + ((chunk ^ (row >> 1 & 3)) << 4);
}
__device__ uint32_t b_at(int row, int chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

__device__ void copy16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ void commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int pending>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
__device__ void load_a(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ void load_b(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(128)
    matmul(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int N, int K) {
  __shared__ __align__(128) uint8_t a_tiles[stages][tile * 64];
  __shared__ __align__(128) uint8_t b_tiles[stages][depth * 128];
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5, row0 = blockIdx.y * tile, column0 = blockIdx.x * tile;

  auto fetch = [&](int k0, int stage) {
    for (int i = t; i < tile * 4; i += 128) {
      copy16(shared_address(a_tiles[stage]) + a_at(i >> 2, i & 3), A + (row0 + (i >> 2)) * K + k0 + (i & 3) * 8);
    }
    for (int i = t; i < depth * 8; i += 128) {
      copy16(shared_address(b_tiles[stage]) + b_at(i >> 3, i & 7), B + (k0 + (i >> 3)) * N + column0 + (i & 7) * 8);
    }
    commit();
  };

  float sums[8][4] = {};
  fetch(0, 0);
  for (int k0 = 0; k0 < K; k0 += depth) {
    const int stage = k0 / depth % stages;
    if (k0 + depth < K) fetch(k0 + depth, stage ^ 1);
    if (k0 + depth < K)
      wait<1>();
    else
      wait<0>();
    __syncthreads();  // the stage is full
    for (int k = 0; k < depth; k += 16) {
      uint32_t a[4];
      load_a(a, shared_address(a_tiles[stage]) + a_at(16 * warp + (lane & 15), k / 8 + (lane >> 4)));
      for (int n = 0; n < 8; n += 2) {
        uint32_t b[4];
        load_b(b, shared_address(b_tiles[stage]) + b_at(k + (lane & 15), n + (lane >> 4)));
        multiply(sums[n], a, b[0], b[1]);
        multiply(sums[n + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();  // the stage may be overwritten
  }
  for (int n = 0; n < 8; ++n) {
    float* const out = C + (row0 + 16 * warp + (lane >> 2)) * N + column0 + 8 * n + (lane & 3) * 2;
    *reinterpret_cast<float2*>(out) = make_float2(sums[n][0], sums[n][1]);
    *reinterpret_cast<float2*>(out + 8 * N) = make_float2(sums[n][2], sums[n][3]);
  }
}
