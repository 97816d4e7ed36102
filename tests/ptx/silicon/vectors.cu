// One instruction to a line: what it gives on a GPU is recorded (record.py), and the runner must give the same.
//
// Every kernel is (in, out), both arrays of words [slots][threads]: a thread reads its word of an input slot and writes
// its word of an output slot. One has maps of the input besides. vectors.py reads the numbers of the output slots and
// the instructions from this file.
#include <cuda.h>

#include <cstdint>

namespace {

struct Slots {
  const uint32_t* in;
  uint32_t* out;
  int threads = gridDim.x * blockDim.x, thread = blockIdx.x * blockDim.x + threadIdx.x;

  __device__ Slots(const uint32_t* in, uint32_t* out) : in(in), out(out) {}
  __device__ uint32_t operator[](int slot) const { return in[slot * threads + thread]; }
  __device__ uint32_t* at(int slot) const { return out + slot * threads + thread; }
};

__device__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

}  // namespace

// clang-format off
#define STORE(slot, type, constraint, text, ...)                   \
  do {                                                             \
    type result;                                                   \
    asm volatile(text : "=" constraint(result) : __VA_ARGS__);     \
    *slots.at(slot) = uint32_t(result);                            \
  } while (0)
// Of the words x, y, z, or of the input slot of the same number; to a word, or to 16 bits.
#define OWN(slot, name) STORE(slot, uint32_t, "r", name " %0, %1;", "r"(slots[slot]))
#define ONE(slot, name) STORE(slot, uint32_t, "r", name " %0, %1;", "r"(x))
#define TWO(slot, name) STORE(slot, uint32_t, "r", name " %0, %1, %2;", "r"(x), "r"(y))
#define THREE(slot, name) STORE(slot, uint32_t, "r", name " %0, %1, %2, %3;", "r"(x), "r"(y), "r"(z))
#define TO_16(slot, name) STORE(slot, uint16_t, "h", name " %0, %1;", "r"(x))
#define FROM_16(slot, name) STORE(slot, uint32_t, "r", name " %0, %1;", "h"(uint16_t(x)))
// The truth of a comparison.
#define TEST(slot, name) \
  STORE(slot, uint32_t, "r", "{.reg .pred p; " name " p, %1, %2; selp.u32 %0, 1, 0, p;}", "r"(x), "r"(y))
// clang-format on

extern "C" __global__ void approximate(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  OWN(0, "ex2.approx.f32");
  OWN(1, "ex2.approx.ftz.f32");
  OWN(2, "lg2.approx.f32");
  OWN(3, "lg2.approx.ftz.f32");
  OWN(4, "rcp.approx.f32");
  OWN(5, "rcp.approx.ftz.f32");
  OWN(6, "rsqrt.approx.f32");
  OWN(7, "rsqrt.approx.ftz.f32");
  OWN(8, "sqrt.approx.f32");
  OWN(9, "sqrt.approx.ftz.f32");
  OWN(10, "tanh.approx.f32");
  OWN(11, "sin.approx.f32");
  OWN(12, "sin.approx.ftz.f32");
  OWN(13, "cos.approx.f32");
  OWN(14, "cos.approx.ftz.f32");
  OWN(15, "rcp.rn.f32");
  OWN(16, "rcp.rn.ftz.f32");
  OWN(17, "sqrt.rn.f32");
  OWN(18, "sqrt.rn.ftz.f32");
}

extern "C" __global__ void approximate_pairs(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  OWN(0, "ex2.approx.f16x2");
  OWN(1, "tanh.approx.f16x2");
  OWN(2, "ex2.approx.ftz.bf16x2");
  OWN(3, "tanh.approx.bf16x2");
}

extern "C" __global__ void divide(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  const uint32_t x = slots[0], y = slots[1];
  TWO(0, "div.approx.f32");
  TWO(1, "div.approx.ftz.f32");
  TWO(2, "div.full.f32");
  TWO(3, "div.full.ftz.f32");
  TWO(4, "div.rn.f32");
  TWO(5, "div.rn.ftz.f32");
}

extern "C" __global__ void arithmetic(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  const uint32_t x = slots[0], y = slots[1], z = slots[2];
  TWO(0, "add.rn.f32");
  TWO(1, "add.rn.ftz.f32");
  TWO(2, "add.rz.f32");
  TWO(3, "add.rm.f32");
  TWO(4, "add.rp.f32");
  TWO(5, "add.rz.ftz.f32");
  TWO(6, "add.sat.f32");
  TWO(7, "sub.rn.f32");
  TWO(8, "sub.rn.ftz.f32");
  TWO(9, "mul.rn.f32");
  TWO(10, "mul.rn.ftz.f32");
  TWO(11, "mul.rz.f32");
  TWO(12, "mul.rm.f32");
  TWO(13, "mul.rp.f32");
  TWO(14, "mul.rm.ftz.f32");
  TWO(15, "mul.sat.f32");
  THREE(16, "fma.rn.f32");
  THREE(17, "fma.rn.ftz.f32");
  THREE(18, "fma.rz.f32");
  THREE(19, "fma.rm.f32");
  THREE(20, "fma.rp.f32");
  THREE(21, "fma.rp.ftz.f32");
  THREE(22, "fma.rn.sat.f32");
  TWO(23, "min.f32");
  TWO(24, "min.ftz.f32");
  TWO(25, "min.NaN.f32");
  TWO(26, "max.f32");
  TWO(27, "max.ftz.f32");
  TWO(28, "max.NaN.f32");
  ONE(29, "abs.f32");
  ONE(30, "abs.ftz.f32");
  ONE(31, "neg.f32");
  ONE(32, "neg.ftz.f32");
  TWO(33, "copysign.f32");
}

extern "C" __global__ void arithmetic_of_halves(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  const uint32_t x = slots[0], y = slots[1], z = slots[2];
  TWO(0, "add.f16x2");
  TWO(1, "add.ftz.f16x2");
  TWO(2, "sub.f16x2");
  TWO(3, "mul.f16x2");
  TWO(4, "mul.ftz.f16x2");
  THREE(5, "fma.rn.f16x2");
  THREE(6, "fma.rn.ftz.f16x2");
  THREE(7, "fma.rn.relu.f16x2");
  TWO(8, "min.f16x2");
  TWO(9, "max.f16x2");
  TWO(10, "min.NaN.f16x2");
  TWO(11, "max.NaN.f16x2");
  ONE(12, "neg.f16x2");
  ONE(13, "abs.f16x2");
}

extern "C" __global__ void arithmetic_of_bfloat16(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  const uint32_t x = slots[0], y = slots[1], z = slots[2];
  TWO(0, "add.bf16x2");
  TWO(1, "sub.bf16x2");
  TWO(2, "mul.bf16x2");
  THREE(3, "fma.rn.bf16x2");
  THREE(4, "fma.rn.relu.bf16x2");
  TWO(5, "min.bf16x2");
  TWO(6, "max.bf16x2");
  TWO(7, "min.NaN.bf16x2");
  TWO(8, "max.NaN.bf16x2");
  ONE(9, "neg.bf16x2");
  ONE(10, "abs.bf16x2");
}

extern "C" __global__ void convert(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  const uint32_t x = slots[0], y = slots[1];
  TO_16(0, "cvt.rn.f16.f32");
  TO_16(1, "cvt.rz.f16.f32");
  TO_16(2, "cvt.rn.ftz.f16.f32");
  TO_16(3, "cvt.rn.bf16.f32");
  TO_16(4, "cvt.rz.bf16.f32");
  TO_16(5, "cvt.rn.relu.f16.f32");
  TO_16(6, "cvt.rn.relu.bf16.f32");
  TWO(7, "cvt.rn.f16x2.f32");
  TWO(8, "cvt.rz.f16x2.f32");
  TWO(9, "cvt.rn.relu.f16x2.f32");
  TWO(10, "cvt.rn.bf16x2.f32");
  TWO(11, "cvt.rz.bf16x2.f32");
  TWO(12, "cvt.rn.relu.bf16x2.f32");
  ONE(13, "cvt.rna.tf32.f32");
  ONE(14, "cvt.rn.tf32.f32");
  ONE(15, "cvt.rni.f32.f32");
  ONE(16, "cvt.rzi.f32.f32");
  ONE(17, "cvt.rmi.f32.f32");
  ONE(18, "cvt.rpi.f32.f32");
  ONE(19, "cvt.sat.f32.f32");
  ONE(20, "cvt.ftz.sat.f32.f32");
  ONE(21, "cvt.rni.s32.f32");
  ONE(22, "cvt.rzi.s32.f32");
  ONE(23, "cvt.rmi.s32.f32");
  ONE(24, "cvt.rpi.s32.f32");
  ONE(25, "cvt.rzi.u32.f32");
  ONE(26, "cvt.rpi.ftz.s32.f32");
}

extern "C" __global__ void convert_integers(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  const uint32_t x = slots[0];
  FROM_16(0, "cvt.f32.f16");
  FROM_16(1, "cvt.f32.bf16");
  FROM_16(2, "cvt.rzi.s32.f16");
  ONE(3, "cvt.rn.f32.s32");
  ONE(4, "cvt.rn.f32.u32");
  TO_16(5, "cvt.rn.f16.s32");
  TO_16(6, "cvt.rn.f16.u32");
  ONE(7, "cvt.s8.s32");
  ONE(8, "cvt.u8.u32");
  ONE(9, "cvt.s16.s32");
  ONE(10, "cvt.sat.s8.s32");
  ONE(11, "cvt.sat.u8.s32");
  ONE(12, "cvt.sat.u8.u32");
  ONE(13, "cvt.sat.s16.s32");
}

extern "C" __global__ void compare(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  const uint32_t x = slots[0], y = slots[1];
  TEST(0, "setp.eq.f32");
  TEST(1, "setp.ne.f32");
  TEST(2, "setp.lt.f32");
  TEST(3, "setp.le.f32");
  TEST(4, "setp.gt.f32");
  TEST(5, "setp.ge.f32");
  TEST(6, "setp.equ.f32");
  TEST(7, "setp.neu.f32");
  TEST(8, "setp.ltu.f32");
  TEST(9, "setp.leu.f32");
  TEST(10, "setp.gtu.f32");
  TEST(11, "setp.geu.f32");
  TEST(12, "setp.num.f32");
  TEST(13, "setp.nan.f32");
  TEST(14, "setp.eq.ftz.f32");
  TEST(15, "setp.lt.ftz.f32");
  TEST(16, "setp.lt.s32");
  TEST(17, "setp.ge.s32");
  TEST(18, "setp.lt.u32");
  TEST(19, "setp.lo.u32");
  TEST(20, "setp.hs.u32");
  TWO(21, "set.lt.u32.f32");
  TWO(22, "set.gt.f32.f32");
}

extern "C" __global__ void integers(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  const uint32_t x = slots[0], y = slots[1], z = slots[2], start = slots[3], length = slots[4];
  THREE(0, "prmt.b32");
  STORE(1, uint32_t, "r", "lop3.b32 %0, %1, %2, %3, 0xCA;", "r"(x), "r"(y), "r"(z));
  STORE(2, uint32_t, "r", "lop3.b32 %0, %1, %2, %3, 0x96;", "r"(x), "r"(y), "r"(z));
  STORE(3, uint32_t, "r", "lop3.b32 %0, %1, %2, %3, 0x1B;", "r"(x), "r"(y), "r"(z));
  STORE(4, uint32_t, "r", "bfe.u32 %0, %1, %2, %3;", "r"(x), "r"(start), "r"(length));
  STORE(5, uint32_t, "r", "bfe.s32 %0, %1, %2, %3;", "r"(x), "r"(start), "r"(length));
  STORE(6, uint32_t, "r", "bfi.b32 %0, %1, %2, %3, %4;", "r"(x), "r"(y), "r"(start), "r"(length));
  STORE(7, uint32_t, "r", "shf.l.wrap.b32 %0, %1, %2, %3;", "r"(x), "r"(y), "r"(start));
  STORE(8, uint32_t, "r", "shf.l.clamp.b32 %0, %1, %2, %3;", "r"(x), "r"(y), "r"(start));
  STORE(9, uint32_t, "r", "shf.r.wrap.b32 %0, %1, %2, %3;", "r"(x), "r"(y), "r"(start));
  STORE(10, uint32_t, "r", "shf.r.clamp.b32 %0, %1, %2, %3;", "r"(x), "r"(y), "r"(start));
  STORE(11, uint32_t, "r", "shl.b32 %0, %1, %2;", "r"(x), "r"(start));
  STORE(12, uint32_t, "r", "shr.u32 %0, %1, %2;", "r"(x), "r"(start));
  STORE(13, uint32_t, "r", "shr.s32 %0, %1, %2;", "r"(x), "r"(start));
  ONE(14, "popc.b32");
  ONE(15, "clz.b32");
  ONE(16, "brev.b32");
  ONE(17, "bfind.u32");
  ONE(18, "bfind.s32");
  ONE(19, "bfind.shiftamt.u32");
  TWO(20, "mul.hi.u32");
  TWO(21, "mul.hi.s32");
  TWO(22, "mul.lo.s32");
  THREE(23, "mad.lo.s32");
  THREE(24, "mad.hi.u32");
  THREE(25, "sad.s32");
  THREE(26, "sad.u32");
  TWO(27, "min.s32");
  TWO(28, "max.u32");
  ONE(29, "abs.s32");
  ONE(30, "cnot.b32");
  TWO(31, "div.s32");
  TWO(32, "div.u32");
  TWO(33, "rem.s32");
  TWO(34, "rem.u32");
}

#define SHUFFLE(slot, name)                             \
  do {                                                  \
    uint32_t value, within;                             \
    asm volatile("{.reg .pred p; " name                 \
                 " %0|p, %2, %3, %4, 0xffffffff;"       \
                 "selp.u32 %1, 1, 0, p;}"               \
                 : "=r"(value), "=r"(within)            \
                 : "r"(x), "r"(distance), "r"(bounds)); \
    *slots.at(slot) = value;                            \
    *slots.at(slot + 1) = within;                       \
  } while (0)
// A vote on x's lowest bit, and a reduction of x.
#define BALLOT(slot, name) \
  STORE(slot, uint32_t, "r", "{.reg .pred p; setp.ne.u32 p, %1, 0; " name " %0, p, %2;}", "r"(x & 1), "r"(mask))
#define VOTE(slot, name)                                                                                       \
  STORE(slot, uint32_t, "r", "{.reg .pred p; setp.ne.u32 p, %1, 0; " name " p, p, %2; selp.u32 %0, 1, 0, p;}", \
        "r"(x & 1), "r"(mask))
#define REDUCE(slot, name) STORE(slot, uint32_t, "r", name " %0, %1, %2;", "r"(x), "r"(mask))

extern "C" __global__ void lanes(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  const uint32_t x = slots[0], distance = slots[1], bounds = slots[2], some = slots[3];
  SHUFFLE(0, "shfl.sync.up.b32");
  SHUFFLE(2, "shfl.sync.down.b32");
  SHUFFLE(4, "shfl.sync.bfly.b32");
  SHUFFLE(6, "shfl.sync.idx.b32");
  uint32_t mask = ~0u;
  BALLOT(8, "vote.sync.ballot.b32");
  VOTE(9, "vote.sync.any.pred");
  VOTE(10, "vote.sync.all.pred");
  VOTE(11, "vote.sync.uni.pred");
  REDUCE(12, "redux.sync.add.u32");
  REDUCE(13, "redux.sync.min.u32");
  REDUCE(14, "redux.sync.max.u32");
  REDUCE(15, "redux.sync.min.s32");
  REDUCE(16, "redux.sync.max.s32");
  REDUCE(17, "redux.sync.and.b32");
  REDUCE(18, "redux.sync.or.b32");
  REDUCE(19, "redux.sync.xor.b32");
  mask = some;
  if (mask >> (threadIdx.x & 31) & 1) {
    BALLOT(20, "vote.sync.ballot.b32");
    VOTE(21, "vote.sync.any.pred");
    VOTE(22, "vote.sync.all.pred");
    VOTE(23, "vote.sync.uni.pred");
    REDUCE(24, "redux.sync.add.s32");
    REDUCE(25, "redux.sync.max.s32");
    STORE(26, uint32_t, "r", "{.reg .pred p; elect.sync %0|p, %1; selp.u32 %0, 1, 0, p;}", "r"(mask));
  }
}

extern "C" __global__ void barriers(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  const uint32_t x = slots[0] & 1;
  STORE(0, uint32_t, "r", "{.reg .pred p; setp.ne.u32 p, %1, 0; bar.red.popc.u32 %0, 0, p;}", "r"(x));
  STORE(1, uint32_t, "r", "{.reg .pred p; setp.ne.u32 p, %1, 0; bar.red.and.pred p, 0, p; selp.u32 %0, 1, 0, p;}",
        "r"(x));
  STORE(2, uint32_t, "r", "{.reg .pred p; setp.ne.u32 p, %1, 0; bar.red.or.pred p, 0, p; selp.u32 %0, 1, 0, p;}",
        "r"(x));
}

// Rows of 16 bytes in shared memory, one to a lane, and the row that each lane names.
#define LOAD_1(slot, name) STORE(slot, uint32_t, "r", name " {%0}, [%1];", "r"(address))
#define LOAD_2(slot, name)                                                                    \
  do {                                                                                        \
    uint32_t r[2];                                                                            \
    asm volatile(name " {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory"); \
    for (int i = 0; i < 2; ++i) *slots.at(slot + i) = r[i];                                   \
  } while (0)
#define LOAD_4(slot, name)                                        \
  do {                                                            \
    uint32_t r[4];                                                \
    asm volatile(name " {%0, %1, %2, %3}, [%4];"                  \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) \
                 : "r"(address)                                   \
                 : "memory");                                     \
    for (int i = 0; i < 4; ++i) *slots.at(slot + i) = r[i];       \
  } while (0)

extern "C" __global__ void load_matrices(const uint32_t* in, uint32_t* out) {
  __shared__ __align__(16) uint32_t rows[32][4];
  const Slots slots(in, out);
  for (int i = 0; i < 4; ++i) rows[threadIdx.x][i] = slots[i];
  __syncthreads();
  const uint32_t address = shared_address(rows[slots[4]]);
  LOAD_1(0, "ldmatrix.sync.aligned.m8n8.x1.shared.b16");
  LOAD_2(1, "ldmatrix.sync.aligned.m8n8.x2.shared.b16");
  LOAD_4(3, "ldmatrix.sync.aligned.m8n8.x4.shared.b16");
  LOAD_1(7, "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16");
  LOAD_2(8, "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16");
  LOAD_4(10, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16");
  STORE(14, uint32_t, "r", "movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;", "r"(slots[0]));
}

// Stores what the lanes hold and shows the rows that it went to; rows that were not written are zeros.
#define STORED(slot, text, ...)                                             \
  do {                                                                      \
    for (int i = 0; i < 4; ++i) rows[threadIdx.x][i] = 0;                   \
    __syncthreads();                                                        \
    asm volatile(text::"r"(address), __VA_ARGS__ : "memory");               \
    __syncthreads();                                                        \
    for (int i = 0; i < 4; ++i) *slots.at(slot + i) = rows[threadIdx.x][i]; \
    __syncthreads();                                                        \
  } while (0)

extern "C" __global__ void store_matrices(const uint32_t* in, uint32_t* out) {
  __shared__ __align__(16) uint32_t rows[32][4];
  const Slots slots(in, out);
  const uint32_t a = slots[0], b = slots[1], c = slots[2], d = slots[3], address = shared_address(rows[slots[4]]);
  STORED(0, "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};", "r"(a));
  STORED(4, "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};", "r"(a), "r"(b));
  STORED(8, "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};", "r"(a), "r"(b), "r"(c), "r"(d));
  STORED(12, "stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};", "r"(a));
  STORED(16, "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};", "r"(a), "r"(b));
  STORED(20, "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};", "r"(a), "r"(b), "r"(c), "r"(d));
}

// Input slots 0 to 3 hold A, 4 and 5 B, 6 to 9 C, as fragments.
#define MULTIPLY_LARGE(slot, name)                                                                           \
  do {                                                                                                       \
    uint32_t d[4];                                                                                           \
    asm volatile(name " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                 \
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                            \
                 : "r"(slots[0]), "r"(slots[1]), "r"(slots[2]), "r"(slots[3]), "r"(slots[4]), "r"(slots[5]), \
                   "r"(slots[6]), "r"(slots[7]), "r"(slots[8]), "r"(slots[9]));                              \
    for (int i = 0; i < 4; ++i) *slots.at(slot + i) = d[i];                                                  \
  } while (0)
#define MULTIPLY_SMALL(slot, name)                                                                           \
  do {                                                                                                       \
    uint32_t d[4];                                                                                           \
    asm volatile(name " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"                                \
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])                                            \
                 : "r"(slots[0]), "r"(slots[1]), "r"(slots[4]), "r"(slots[6]), "r"(slots[7]), "r"(slots[8]), \
                   "r"(slots[9]));                                                                           \
    for (int i = 0; i < 4; ++i) *slots.at(slot + i) = d[i];                                                  \
  } while (0)

extern "C" __global__ void multiply_bf16(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  MULTIPLY_LARGE(0, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
  MULTIPLY_SMALL(4, "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32");
}

extern "C" __global__ void multiply_f16(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  MULTIPLY_LARGE(0, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
  MULTIPLY_SMALL(4, "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32");
}

extern "C" __global__ void multiply_tf32(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  MULTIPLY_LARGE(0, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
  MULTIPLY_SMALL(4, "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32");
}

// Products of a warpgroup. Input slots as above, for four warps, which share the B of the first: in shared memory,
// eight columns of 16 bytes of K, then the next 16 bytes.
__device__ uint64_t descriptor(const void* begin, int leading, int stride, int swizzle) {
  return uint64_t(shared_address(begin) / 16) | uint64_t(leading / 16) << 16 | uint64_t(stride / 16) << 32 |
         uint64_t(swizzle) << 62;
}
#define WGMMA_BEGIN "wgmma.fence.sync.aligned; "
#define WGMMA_END "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
#define MULTIPLY_WARPGROUP(slot, name, how)                                                                    \
  do {                                                                                                         \
    __shared__ __align__(128) uint32_t b[64];                                                                  \
    for (int i = 0; i < 2; ++i)                                                                                \
      if (threadIdx.x < 32) b[32 * i + threadIdx.x] = slots[4 + i];                                            \
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                                               \
    __syncthreads();                                                                                           \
    float d[4];                                                                                                \
    for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(slots[6 + i]);                                          \
    asm volatile(WGMMA_BEGIN name " {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, " how "; " WGMMA_END               \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                              \
                 : "r"(slots[0]), "r"(slots[1]), "r"(slots[2]), "r"(slots[3]), "l"(descriptor(b, 128, 128, 0)) \
                 : "memory");                                                                                  \
    for (int i = 0; i < 4; ++i) *slots.at(slot + i) = __float_as_uint(d[i]);                                   \
  } while (0)

extern "C" __global__ void __launch_bounds__(128) multiply_warpgroup_bf16(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  MULTIPLY_WARPGROUP(0, "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16", "1, 1, 1, 0");
}

extern "C" __global__ void __launch_bounds__(128) multiply_warpgroup_f16(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  MULTIPLY_WARPGROUP(0, "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16", "1, 1, 1, 0");
}

extern "C" __global__ void __launch_bounds__(128) multiply_warpgroup_tf32(const uint32_t* in, uint32_t* out) {
  const Slots slots(in, out);
  MULTIPLY_WARPGROUP(0, "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32", "1, 1, 1");
}

// Where the elements of operands lie: 16 KB of shared memory hold numbers that are all different, and the other operand
// is an identity matrix, so that the product is the operand as it was read. All start at a multiple of 1,024 and then
// `begin` bytes; see vectors.py.
#define NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_64                                                                                                  \
  NAMES_8                                                                                                         \
  ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29," \
  "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51," \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_8(i)                                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define SUMS_32(i) SUMS_8(i), SUMS_8(i + 8), SUMS_8(i + 16), SUMS_8(i + 24)
#define RIGHT(slot, name, turned, begin, leading, stride, swizzle)                                              \
  do {                                                                                                          \
    float d[64] = {};                                                                                           \
    asm volatile(WGMMA_BEGIN name " {" NAMES_64 "}, {%64, %65, %65, %64}, %66, 0, 1, 1, " turned "; " WGMMA_END \
                 : SUMS_32(0), SUMS_32(32)                                                                      \
                 : "r"(diagonal), "r"(0), "l"(descriptor(memory + begin, leading, stride, swizzle))             \
                 : "memory");                                                                                   \
    for (int i = 0; i < 64; ++i) *slots.at(slot + i) = __float_as_uint(d[i]);                                   \
  } while (0)
#define LEFT(slot, name, turned, begin, leading, stride, swizzle)                                                    \
  do {                                                                                                               \
    float d[8] = {};                                                                                                 \
    asm volatile(WGMMA_BEGIN name " {" NAMES_8 "}, %8, %9, 0, 1, 1, " turned ", 0; " WGMMA_END                       \
                 : SUMS_8(0)                                                                                         \
                 : "l"(descriptor(memory + begin, leading, stride, swizzle)), "l"(descriptor(identity, 128, 256, 0)) \
                 : "memory");                                                                                        \
    for (int i = 0; i < 8; ++i) *slots.at(slot + i) = __float_as_uint(d[i]);                                         \
  } while (0)

extern "C" __global__ void __launch_bounds__(128) operands(const uint32_t* in, uint32_t* out) {
  __shared__ __align__(1024) uint8_t memory[16384];
  __shared__ __align__(128) uint16_t identity[2][2][8][8];  // of columns, of K
  const Slots slots(in, out);
  constexpr uint16_t one = 0x3c00;
  for (int i = 0; i < 32; ++i) reinterpret_cast<uint32_t*>(memory)[128 * i + threadIdx.x] = slots[i];
  for (int i = 0; i < 2; ++i) {
    const int row = threadIdx.x / 8 % 8, column = threadIdx.x % 8, of_k = threadIdx.x / 64;
    identity[i][of_k][row][column] = i == of_k && row == column ? one : 0;
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const uint32_t row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  const uint32_t diagonal = row == column ? one : row == column + 1 ? uint32_t(one) << 16 : 0;
  RIGHT(0, "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", "0", 0, 2048, 128, 0);
  RIGHT(64, "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", "0", 0, 16, 256, 3);
  RIGHT(128, "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", "0", 32, 16, 512, 2);
  RIGHT(192, "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", "0", 96, 16, 1024, 1);
  RIGHT(256, "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", "1", 0, 2048, 128, 0);
  RIGHT(320, "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", "1", 0, 512, 256, 3);
  RIGHT(384, "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", "1", 0, 1024, 512, 2);
  RIGHT(448, "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16", "1", 2048, 4096, 1024, 1);
  LEFT(512, "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16", "0", 64, 16, 1024, 1);
  LEFT(520, "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16", "1", 0, 16, 1024, 1);
  LEFT(528, "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16", "1", 0, 1024, 512, 2);
}

// The first 16 bytes of a slot of shared memory: what was there, then a copy of which some bytes are given.
#define COPIED(slot, name, bytes, given)                                                                          \
  do {                                                                                                            \
    for (int i = 0; i < 4; ++i) to[threadIdx.x][i] = 0xa5a5a5a5;                                                  \
    asm volatile(name " [%0], [%1], " bytes ", %2;" ::"r"(shared_address(to[threadIdx.x])), "l"(from), "r"(given) \
                 : "memory");                                                                                     \
    asm volatile("cp.async.commit_group;" ::: "memory");                                                          \
    asm volatile("cp.async.wait_group 0;" ::: "memory");                                                          \
    for (int i = 0; i < 4; ++i) *slots.at(slot + i) = to[threadIdx.x][i];                                         \
  } while (0)

// Input slots 0 to 3 are read as 16 bytes for each thread.
extern "C" __global__ void copies(const uint32_t* in, uint32_t* out) {
  __shared__ __align__(16) uint32_t to[32][4];
  const Slots slots(in, out);
  const uint64_t from = uint64_t(__cvta_generic_to_global(in + 4 * slots.thread));
  COPIED(0, "cp.async.ca.shared.global", "4", slots[4]);
  COPIED(4, "cp.async.ca.shared.global", "8", slots[5]);
  COPIED(8, "cp.async.ca.shared.global", "16", slots[6]);
  COPIED(12, "cp.async.cg.shared.global", "16", slots[6]);
}

// Boxes of a matrix that is all of the input, by maps of it (vectors.py): what 4 KB of shared memory hold then.
#define BOX(slot, name, map, column, row, bytes)                                                                   \
  do {                                                                                                             \
    __syncthreads();                                                                                               \
    for (int i = 0; i < 32; ++i) memory[32 * i + threadIdx.x] = 0xa5a5a5a5;                                        \
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                                                   \
    __syncthreads();                                                                                               \
    if (threadIdx.x == 0) {                                                                                        \
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(bytes) : "memory");   \
      asm volatile(name " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(memory)), "l"(&map), "r"(column),      \
                   "r"(row), "r"(full)                                                                             \
                   : "memory");                                                                                    \
    }                                                                                                              \
    for (int over = 0; !over;) {                                                                                   \
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }" \
                   : "=r"(over)                                                                                    \
                   : "r"(full), "r"(phase)                                                                         \
                   : "memory");                                                                                    \
    }                                                                                                              \
    phase ^= 1;                                                                                                    \
    for (int i = 0; i < 32; ++i) *slots.at(slot + i) = memory[32 * i + threadIdx.x];                               \
  } while (0)

extern "C" __global__ void boxes(const uint32_t* in, uint32_t* out, const __grid_constant__ CUtensorMap rows_of_128,
                                 const __grid_constant__ CUtensorMap rows_of_64,
                                 const __grid_constant__ CUtensorMap rows_of_32,
                                 const __grid_constant__ CUtensorMap plain) {
  __shared__ __align__(1024) uint32_t memory[1024];
  __shared__ uint64_t barrier;
  const Slots slots(in, out);
  const uint32_t full = shared_address(&barrier);
  if (threadIdx.x == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full) : "memory");
  int phase = 0;
  BOX(0, "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes", rows_of_128, 0, 8, 4096);
  BOX(32, "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes", rows_of_128, 8, 30, 4096);
  BOX(64, "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes", rows_of_128, -3, -5, 4096);
  BOX(96, "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes", rows_of_64, 32, 30, 2048);
  BOX(128, "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes", rows_of_32, 48, 4, 1024);
  BOX(160, "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes", plain, 24, 33, 1536);
}

// A word of its own for each thread: what is there in the end, and what the atomic returned.
#define ATOMIC(slot, name)                                                                    \
  do {                                                                                        \
    uint32_t old;                                                                             \
    *slots.at(slot) = x;                                                                      \
    asm volatile(name " %0, [%1], %2;" : "=r"(old) : "l"(slots.at(slot)), "r"(y) : "memory"); \
    *slots.at(slot + 1) = old;                                                                \
  } while (0)
#define ATOMIC_16(slot, name)                                                                           \
  do {                                                                                                  \
    uint16_t old;                                                                                       \
    *slots.at(slot) = x;                                                                                \
    asm volatile(name " %0, [%1], %2;" : "=h"(old) : "l"(slots.at(slot)), "h"(uint16_t(y)) : "memory"); \
    *slots.at(slot + 1) = old;                                                                          \
  } while (0)
#define ATOMIC_SHARED(slot, name)                                                                                  \
  do {                                                                                                             \
    uint32_t old;                                                                                                  \
    cells[threadIdx.x] = x;                                                                                        \
    asm volatile(name " %0, [%1], %2;" : "=r"(old) : "r"(shared_address(cells + threadIdx.x)), "r"(y) : "memory"); \
    *slots.at(slot) = cells[threadIdx.x];                                                                          \
    *slots.at(slot + 1) = old;                                                                                     \
  } while (0)

extern "C" __global__ void atomics(const uint32_t* in, uint32_t* out) {
  __shared__ uint32_t cells[128];
  const Slots slots(in, out);
  const uint32_t x = slots[0], y = slots[1];
  ATOMIC(0, "atom.global.add.u32");
  ATOMIC(2, "atom.global.add.f32");
  ATOMIC(4, "atom.global.min.s32");
  ATOMIC(6, "atom.global.max.s32");
  ATOMIC(8, "atom.global.min.u32");
  ATOMIC(10, "atom.global.max.u32");
  ATOMIC(12, "atom.global.inc.u32");
  ATOMIC(14, "atom.global.dec.u32");
  ATOMIC(16, "atom.global.exch.b32");
  ATOMIC(18, "atom.global.and.b32");
  ATOMIC(20, "atom.global.or.b32");
  ATOMIC(22, "atom.global.xor.b32");
  ATOMIC_16(24, "atom.global.add.noftz.f16");
  ATOMIC_16(26, "atom.global.add.noftz.bf16");
  ATOMIC_SHARED(28, "atom.shared.add.u32");
  ATOMIC_SHARED(30, "atom.shared.add.f32");
  ATOMIC_SHARED(32, "atom.shared.min.s32");
  ATOMIC_SHARED(34, "atom.shared.inc.u32");
  ATOMIC_SHARED(36, "atom.shared.dec.u32");
  uint32_t old;
  *slots.at(38) = x;
  asm volatile("atom.global.cas.b32 %0, [%1], %2, %3;" : "=r"(old) : "l"(slots.at(38)), "r"(y), "r"(~y) : "memory");
  *slots.at(39) = old;
  // All threads add to one word, which begins as zero.
  asm volatile("red.global.add.u32 [%0], %1;" ::"l"(out + 40 * slots.threads), "r"(x) : "memory");
}
