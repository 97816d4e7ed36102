// Boxes of tensors of up to five dimensions, as the copy engine leaves them in shared memory.
#include <cuda.h>

#include <cstdint>

namespace {

__device__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

}  // namespace

// A box as it lies, of `bytes` bytes.
#define BOX(rank, coordinates)                                                                                        \
  extern "C" __global__ void box_##rank(const __grid_constant__ CUtensorMap map, uint32_t* out, int bytes, int a,     \
                                        int b, int c, int d, int e) {                                                 \
    extern __shared__ __align__(1024) uint8_t memory[];                                                               \
    __shared__ uint64_t full;                                                                                         \
    const uint32_t barrier = shared_address(&full);                                                                   \
    if (threadIdx.x == 0) {                                                                                           \
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");                               \
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                                                    \
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");   \
      asm volatile("cp.async.bulk.tensor." #rank                                                                      \
                   ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" coordinates                    \
                   "}], [%7];" ::"r"(shared_address(memory)),                                                         \
                   "l"(&map), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e), "r"(barrier)                                    \
                   : "memory");                                                                                       \
    }                                                                                                                 \
    __syncthreads();                                                                                                  \
    asm volatile(                                                                                                     \
        "{ .reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; @!p bra again; }" ::"r"(barrier) \
        : "memory");                                                                                                  \
    for (int i = threadIdx.x; i < bytes / 4; i += 32) out[i] = reinterpret_cast<const uint32_t*>(memory)[i];          \
  }

BOX(1d, "%2")
BOX(2d, "%2, %3")
BOX(3d, "%2, %3, %4")
BOX(4d, "%2, %3, %4, %5")
BOX(5d, "%2, %3, %4, %5, %6")

// Words of 32 bits to a box of a matrix, which they lie as in shared memory.
#define STORE_BOX(name, instruction)                                                                                  \
  extern "C" __global__ void name(const __grid_constant__ CUtensorMap map, const uint32_t* in, int bytes, int column, \
                                  int row) {                                                                          \
    extern __shared__ __align__(1024) uint8_t memory[];                                                               \
    for (int i = threadIdx.x; i < bytes / 4; i += 32) reinterpret_cast<uint32_t*>(memory)[i] = in[i];                 \
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                                                      \
    __syncthreads();                                                                                                  \
    if (threadIdx.x != 0) return;                                                                                     \
    asm volatile(instruction " [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column), "r"(row), "r"(shared_address(memory)) \
                 : "memory");                                                                                         \
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");                                                         \
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");                                                         \
  }

STORE_BOX(store_box, "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group")
STORE_BOX(add_box, "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group")
