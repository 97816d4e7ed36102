// Products of a warpgroup on Hopper's tensor cores (wgmma): 64 rows by N columns, of which each of its four warps holds
// 16 rows as it would fragments of mma.sync (ptx.cuh), 16 columns of the left operand at a time. Only for compute
// capability 9.0 itself ("sm_90a"): no other has these instructions.
//
// A product is only begun. Its operands in shared memory and in registers are read, and its results written, until a
// wait for its group: `held` tells the compiler, which knows nothing of that, that registers change there.
//
// Operands in shared memory are told by a descriptor: where they begin, and how far apart their pieces lie. All here
// are `Panels`: 64 columns of all rows, then the next 64. So a row of a panel has 128 bytes, and its chunks of 16 bytes
// are permuted by the row as tensor cores expect it (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory
// Layout", the swizzle of 128 bytes).
#pragma once

#include "ptx.cuh"

namespace pytransformer::cuda {

template <int ROWS, int D>
struct Panels {
  static constexpr int chunks = D / 8;  // of a row
  static constexpr int row_bytes = 128, panel_bytes = ROWS * row_bytes, group_bytes = 8 * row_bytes;
  static_assert(D % 64 == 0 && ROWS % 8 == 0);

  uint32_t base;  // a multiple of 1,024

  __device__ uint32_t chunk(int row, int index) const {
    return base + index / 8 * panel_bytes + row * row_bytes + ((index ^ row) & 7) * 16;
  }

  // 16 columns from 16 k on, of 64 or N rows from the first on, which run along the columns that a product sums over.
  __device__ uint64_t along_rows(int k) const { return descriptor(k / 4 * panel_bytes + k % 4 * 32); }

  // 16 rows from 16 k on, which a product sums over, of the columns from that of `panel` on.
  __device__ uint64_t across_rows(int panel, int k) const {
    return descriptor(panel * panel_bytes + 16 * k * row_bytes);
  }

 private:
  // All lengths are in units of 16 bytes. The lower word has where the operand begins and how far apart panels are,
  // which counts where rows are summed over; the upper one how far apart groups of eight rows are, and the swizzle.
  __device__ uint64_t descriptor(int offset) const {
    constexpr uint32_t panels_apart = panel_bytes / 16 << 16, groups_apart = group_bytes / 16;
    constexpr uint32_t swizzle_of_128_bytes = 1u << 30;
    return uint64_t(groups_apart | swizzle_of_128_bytes) << 32 | ((base >> 4 | panels_apart) + uint32_t(offset / 16));
  }
};

namespace ptx {

// What a product reads or writes in registers is here as it is to be then.
template <int N>
__device__ inline void held(float (&x)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : "+f"(x[n][0]), "+f"(x[n][1]), "+f"(x[n][2]), "+f"(x[n][3])::"memory");
}

template <int N>
__device__ inline void held(uint32_t (&x)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) asm volatile("" : "+r"(x[n][0]), "+r"(x[n][1]), "+r"(x[n][2]), "+r"(x[n][3])::"memory");
}

// Before the first product after registers of it have been written.
__device__ inline void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of products begun since the last one.
__device__ inline void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most N groups are under way.
template <int N>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Shows what this thread has written to shared memory, or waited for, to tensor cores and to the copy engine.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier in shared memory at which threads arrive without waiting, for others to wait for. Its phases alternate in
// parity, from 0 on, and are over after `arrivals`; the one before the first counts as over.
__device__ inline void make_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void arrive_at(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void wait_for_phase(uint32_t barrier, int parity) {
  int over;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
                 : "=r"(over)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!over);
}

__device__ inline bool phase_is_over(uint32_t barrier, int parity) {
  int over;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }"
               : "=r"(over)
               : "r"(barrier), "r"(parity)
               : "memory");
  return over;
}

// The barrier's phase is not over until so many bytes more have come, of boxes that are counted there.
__device__ inline void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Asks the copy engine for a box of a tensor (tensor_map.h), whose first element is told; it is swizzled as Panels are.
__device__ inline void load_box(uint32_t to, const void* map, int column, int row, int head, int batch,
                                uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}

// How many registers each thread of this warpgroup has from here on. Of those at the launch, others' can be taken over.
template <int N>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ inline void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// sum[FIRST + n] (+)= a b^T, and += a b, for N columns; the left operand of the second is in registers. `sum` is
// overwritten where it is not to be `added` to.
template <class T, int N>
struct WarpgroupProduct;

#define PYTRANSFORMER_SUMS_8(n)                                                                                 \
  "+f"(sum[n][0]), "+f"(sum[n][1]), "+f"(sum[n][2]), "+f"(sum[n][3]), "+f"(sum[n + 1][0]), "+f"(sum[n + 1][1]), \
      "+f"(sum[n + 1][2]), "+f"(sum[n + 1][3])
#define PYTRANSFORMER_SUMS_16(n) PYTRANSFORMER_SUMS_8(n), PYTRANSFORMER_SUMS_8(n + 2)
#define PYTRANSFORMER_SUMS_32(n) PYTRANSFORMER_SUMS_16(n), PYTRANSFORMER_SUMS_16(n + 4)
#define PYTRANSFORMER_SUMS_64(n) PYTRANSFORMER_SUMS_32(n), PYTRANSFORMER_SUMS_32(n + 8)
#define PYTRANSFORMER_NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PYTRANSFORMER_NAMES_32 PYTRANSFORMER_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PYTRANSFORMER_NAMES_64                                                                                        \
  PYTRANSFORMER_NAMES_32                                                                                              \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63"

// `A` to `E` name the operands behind the sums.
#define PYTRANSFORMER_WARPGROUP_PRODUCT(TYPE, NAME, COLUMNS, NAMES, SUMS, A, B, C, D, E)                           \
  template <>                                                                                                      \
  struct WarpgroupProduct<TYPE, COLUMNS> {                                                                         \
    template <int FIRST, int C8>                                                                                   \
    __device__ static void of_rows(float (&sum)[C8][4], uint64_t a, uint64_t b, bool added) {                      \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, " C                                                             \
                   ", 0;\n"                                                                                        \
                   "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " {" NAMES "}, " A ", " B \
                   ", p, 1, 1, 0, 0; }"                                                                            \
                   : SUMS                                                                                          \
                   : "l"(a), "l"(b), "r"(int(added))                                                               \
                   : "memory");                                                                                    \
    }                                                                                                              \
    template <int FIRST, int C8>                                                                                   \
    __device__ static void of_weights(float (&sum)[C8][4], const uint32_t (&a)[4], uint64_t b) {                   \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " {" NAMES "}, {" A "," B \
                   "," C "," D "}, " E ", 1, 1, 1, 1;"                                                             \
                   : SUMS                                                                                          \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                            \
                   : "memory");                                                                                    \
    }                                                                                                              \
  };

#define PYTRANSFORMER_WARPGROUP_PRODUCTS(TYPE, NAME)                                                                   \
  PYTRANSFORMER_WARPGROUP_PRODUCT(TYPE, NAME, 32, PYTRANSFORMER_NAMES_16, PYTRANSFORMER_SUMS_16(FIRST), "%16", "%17",  \
                                  "%18", "%19", "%20")                                                                 \
  PYTRANSFORMER_WARPGROUP_PRODUCT(TYPE, NAME, 64, PYTRANSFORMER_NAMES_32, PYTRANSFORMER_SUMS_32(FIRST), "%32", "%33",  \
                                  "%34", "%35", "%36")                                                                 \
  PYTRANSFORMER_WARPGROUP_PRODUCT(TYPE, NAME, 128, PYTRANSFORMER_NAMES_64, PYTRANSFORMER_SUMS_64(FIRST), "%64", "%65", \
                                  "%66", "%67", "%68")

PYTRANSFORMER_WARPGROUP_PRODUCTS(__half, "f16")
PYTRANSFORMER_WARPGROUP_PRODUCTS(__nv_bfloat16, "bf16")

#undef PYTRANSFORMER_WARPGROUP_PRODUCTS
#undef PYTRANSFORMER_WARPGROUP_PRODUCT
#undef PYTRANSFORMER_NAMES_64
#undef PYTRANSFORMER_NAMES_32
#undef PYTRANSFORMER_NAMES_16
#undef PYTRANSFORMER_SUMS_64
#undef PYTRANSFORMER_SUMS_32
#undef PYTRANSFORMER_SUMS_16
#undef PYTRANSFORMER_SUMS_8

}  // namespace ptx
}  // namespace pytransformer::cuda
