// Sums of columns of a matrix whose tiles the copy engine brings: a ring of two slots, between one thread that asks and
// four warps that add.
//
// The matrix is [rows, columns], 16-bit words, at most 64 columns; a tile has 32 rows of 128 bytes, swizzled as its map
// says. Rows and columns beyond the matrix are zeros.
#include <cuda.h>

#include <cstdint>

namespace {

constexpr int slots = 2, tile_rows = 32, tile_bytes = tile_rows * 128, adding = 128;

__device__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
__device__ void make_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ void wait(uint64_t* barrier, int parity) {
  int over;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                 : "=r"(over)
                 : "r"(shared_address(barrier)), "r"(parity)
                 : "memory");
  } while (!over);
}
__device__ void load_box(void* to, const CUtensorMap* map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(to)),
      "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

}  // namespace

extern "C" __global__ void __launch_bounds__(adding + 32)
    column_sums(const __grid_constant__ CUtensorMap map, uint32_t* sums, int rows) {
  __shared__ __align__(1024) uint8_t tile[slots][tile_bytes];
  __shared__ uint64_t full[slots], empty[slots];
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < slots; ++slot) {
      make_barrier(full + slot, 1);
      make_barrier(empty + slot, adding);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  const int tiles = (rows + tile_rows - 1) / tile_rows;
  if (threadIdx.x >= adding) {
    for (int i = 0; threadIdx.x == adding && i < tiles; ++i) {
      const int slot = i % slots, turn = i / slots % 2;
      wait(empty + slot, turn ^ 1);
      arrive_expecting(full + slot, tile_bytes);
      load_box(tile[slot], &map, 0, i * tile_rows, full + slot);
    }
    return;
  }
  const int column = threadIdx.x % 64, first = threadIdx.x / 64 * (tile_rows / 2);
  uint32_t sum = 0;
  for (int i = 0; i < tiles; ++i) {
    const int slot = i % slots, turn = i / slots % 2;
    wait(full + slot, turn);
    for (int row = first; row < first + tile_rows / 2; ++row) {
      const int chunk = column / 8 ^ row % 8;
      sum += *reinterpret_cast<const uint16_t*>(tile[slot] + row * 128 + chunk * 16 + column % 8 * 2);
    }
    arrive(empty + slot);
  }
  sums[threadIdx.x] = sum;
}
