// AMX: eight registers of 16 rows of 64 bytes, and one instruction that multiplies two of them.
//
// One product adds A[16][32] B[32][16], of bfloat16, to 16 x 16 sums of float32: eight times what AVX512-BF16 does in
// the same cycles. A register is a matrix whose rows may lie anywhere in memory, a stride apart; B lies in pairs of k,
// as for AVX512-BF16 (tile.h). Sums leave the unit through memory only.
//
// How many rows and bytes a register has is configured for all of them at once, which also clears them. Here:
//
//     0 to 3   sums, `rows` x 16                                      4, 5   A, `rows` x 32, and B, 32 x 16
//                                                                     6, 7   the same with only `tail` pairs of k
//
// A configuration belongs to a thread and may be another library's: parallel_tasks holds a MatrixUnit on each of its
// threads, which configures at the first product, and leaves the unit as it would like to find it: released.
//
// PYTRANSFORMER_EMULATE_AMX spells the registers out in memory, so that the kernels can be tested on machines that lack
// the unit.
#pragma once

#if defined(__AMX_BF16__) || defined(PYTRANSFORMER_EMULATE_AMX)
#define PYTRANSFORMER_AMX 1
#endif

#ifdef PYTRANSFORMER_AMX

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace pytransformer::PYTRANSFORMER_ISA {

constexpr int unit_rows = 16;   // of a register
constexpr int unit_pairs = 16;  // of k, in one
static_assert(Vec::lanes == 16, "a row of sums is a vector");

// The memory form of a configuration: palette 1, and for each register the bytes of a row and the rows.
struct alignas(64) UnitShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  UnitShape(int row_count, int tail) {
    for (int i = 0; i < 4; ++i) set(i, row_count, 64);
    set(4, row_count, 64), set(5, unit_pairs, 64);
    if (tail > 0) set(6, row_count, 4 * tail), set(7, tail, 64);
  }
  void set(int i, int row_count, int bytes) { rows[i] = uint8_t(row_count), row_bytes[i] = uint16_t(bytes); }
};
static_assert(sizeof(UnitShape) == 64);

#ifdef __AMX_BF16__

inline void configure_unit(const UnitShape& shape) {
  __asm__ volatile("ldtilecfg %0" ::"m"(shape) : "memory");
}
inline void release_unit() {
  __asm__ volatile("tilerelease");
}
// Rows are `stride` bytes apart.
template <int Register>
inline void load_register(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Register) : "memory");
}
template <int Register>
inline void store_register(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Register) : "memory");
}
template <int Register>
inline void clear_register() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(Register));
}
// Sums += A B.
template <int Sums, int A, int B>
inline void multiply_registers() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(A), "i"(B));
}

#else

struct EmulatedUnit {
  UnitShape shape{0, 0};
  alignas(64) char registers[8][unit_rows][64];

  char* row(int i, int r) { return registers[i][r]; }
};
inline EmulatedUnit& unit() {
  static thread_local EmulatedUnit one;
  return one;
}
inline void configure_unit(const UnitShape& shape) {
  unit().shape = shape;
  std::memset(unit().registers, 0, sizeof unit().registers);
}
inline void release_unit() {
  configure_unit(UnitShape(0, 0));
}
template <int Register>
inline void load_register(const void* from, int64_t stride) {
  for (int r = 0; r < unit().shape.rows[Register]; ++r) {
    std::memset(unit().row(Register, r), 0, 64);
    std::memcpy(unit().row(Register, r), static_cast<const char*>(from) + r * stride, unit().shape.row_bytes[Register]);
  }
}
template <int Register>
inline void store_register(void* to, int64_t stride) {
  for (int r = 0; r < unit().shape.rows[Register]; ++r) {
    std::memcpy(static_cast<char*>(to) + r * stride, unit().row(Register, r), unit().shape.row_bytes[Register]);
  }
}
template <int Register>
inline void clear_register() {
  std::memset(unit().registers[Register], 0, sizeof unit().registers[Register]);
}
template <int Sums, int A, int B>
inline void multiply_registers() {
  EmulatedUnit& u = unit();
  for (int r = 0; r < u.shape.rows[Sums]; ++r) {
    float* sums = reinterpret_cast<float*>(u.row(Sums, r));
    const bfloat16* a = reinterpret_cast<const bfloat16*>(u.row(A, r));
    Vec acc = Vec::zero();
    for (int k = 0; k < u.shape.rows[B]; ++k) {
      acc = dot(PairVec::broadcast(a + 2 * k), PairVec::load(reinterpret_cast<const bfloat16*>(u.row(B, k))), acc);
    }
    (Vec::load(sums) + acc).store(sums);
  }
}

#endif

// The unit of a thread, as it is configured: not, at first.
struct UnitState {
  int rows = 0, tail = 0;
};
inline UnitState& unit_state() {
  static thread_local UnitState state;
  return state;
}

// For as long as a thread works on tasks.
class MatrixUnit {
 public:
  MatrixUnit() { unit_state() = {}; }
  ~MatrixUnit() {
    if (unit_state().rows > 0) release_unit();
    unit_state() = {};
  }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

  static void shape(int rows, int tail) {
    UnitState& now = unit_state();
    // Registers for a tail that is not there may have any shape.
    if (now.rows == rows && (tail == 0 || now.tail == tail)) return;
    configure_unit(UnitShape(rows, tail));
    now = {rows, tail};
  }
};

// c[rows][16 * Vecs] (+)= A B, of up to 16 rows of A, which lie along k, and `pairs` of k. Strides in elements.
template <int Vecs>
inline void multiply_on_unit(int rows, const bfloat16* a, int64_t a_stride, const bfloat16* b, int64_t b_stride,
                             int64_t pairs, float* c, int64_t c_stride, bool add) {
  static_assert(Vecs >= 1 && Vecs <= 4, "registers of sums");
  const int tail = int(pairs % unit_pairs);
  const int64_t whole = pairs - tail, a_bytes = 2 * a_stride, b_bytes = 2 * b_stride, c_bytes = 4 * c_stride;
  MatrixUnit::shape(rows, tail);
  if (add) {
    load_register<0>(c, c_bytes);
    if constexpr (Vecs > 1) load_register<1>(c + 16, c_bytes);
    if constexpr (Vecs > 2) load_register<2>(c + 32, c_bytes);
    if constexpr (Vecs > 3) load_register<3>(c + 48, c_bytes);
  } else {
    clear_register<0>();
    if constexpr (Vecs > 1) clear_register<1>();
    if constexpr (Vecs > 2) clear_register<2>();
    if constexpr (Vecs > 3) clear_register<3>();
  }
  const auto step = [&](auto a_register, auto b_register, int64_t pair) {
    constexpr int A = a_register, B = b_register;
    const bfloat16* row = b + pair * b_stride;
    load_register<A>(a + 2 * pair, a_bytes);
    load_register<B>(row, b_bytes), multiply_registers<0, A, B>();
    if constexpr (Vecs > 1) load_register<B>(row + 32, b_bytes), multiply_registers<1, A, B>();
    if constexpr (Vecs > 2) load_register<B>(row + 64, b_bytes), multiply_registers<2, A, B>();
    if constexpr (Vecs > 3) load_register<B>(row + 96, b_bytes), multiply_registers<3, A, B>();
  };
  for (int64_t pair = 0; pair < whole; pair += unit_pairs) {
    step(std::integral_constant<int, 4>{}, std::integral_constant<int, 5>{}, pair);
  }
  if (tail > 0) step(std::integral_constant<int, 6>{}, std::integral_constant<int, 7>{}, whole);
  store_register<0>(c, c_bytes);
  if constexpr (Vecs > 1) store_register<1>(c + 16, c_bytes);
  if constexpr (Vecs > 2) store_register<2>(c + 32, c_bytes);
  if constexpr (Vecs > 3) store_register<3>(c + 48, c_bytes);
}

}  // namespace pytransformer::PYTRANSFORMER_ISA

#endif  // PYTRANSFORMER_AMX
