// Matrix fragments of a warp: ldmatrix, stmatrix, movmatrix and mma.sync.
//
// The layouts are those of the PTX ISA ("Matrix Fragments for mma.m16n8k16" and its neighbours): in an 8x8 matrix of
// 16-bit elements, lane l holds row l / 4, columns 2 (l % 4) and the next. How products are summed: products.h.
#include <cstring>

#include "block.h"
#include "instructions.h"
#include "order.h"
#include "products.h"

namespace ptx {
namespace {

enum Kind : uint32_t { kind_load = 0x100, kind_store = 0x200, kind_transpose = 0x300, kind_multiply = 0x400 };

struct Rows {
  uint32_t* rows;
  uint32_t address;
};

using Matrix = uint16_t[8][8];

uint32_t held_by(const Matrix& matrix, uint32_t lane, bool transposed) {
  const uint32_t row = lane / 4, column = lane % 4 * 2;
  return transposed ? joined<uint32_t>(matrix[column][row], matrix[column + 1][row])
                    : joined<uint32_t>(matrix[row][column], matrix[row][column + 1]);
}

void put(Matrix& matrix, uint32_t lane, bool transposed, uint32_t held) {
  const uint32_t row = lane / 4, column = lane % 4 * 2;
  (transposed ? matrix[column][row] : matrix[row][column]) = uint16_t(held);
  (transposed ? matrix[column + 1][row] : matrix[row][column + 1]) = uint16_t(held >> 16);
}

// The row that lane `lane` points to, on that lane's behalf.
uint8_t* row_at(uint32_t lane, uint32_t address, bool write, Line line) {
  Thread* const outer = current;
  const bool counted = options.counts;
  options.counts = false;  // `counts::matrix_row_group` has the whole
  current = &block.thread[32 * outer->warp + lane];
  uint8_t* const row = at_shared(address, 16, write, Access::weak, line);
  current = outer;
  options.counts = counted;
  return row;
}

}  // namespace

void load_matrices(uint32_t* rows, int count, bool transposed, uint32_t address, Line line) {
  Rows mine{rows, address};
  meet("ldmatrix", kind_load, ~0u, &mine, line, [=](void* const* brought, uint32_t) {
    for (int m = 0; m < count; ++m) {
      Matrix matrix;
      uint32_t addresses[8];
      for (uint32_t i = 0; i < 8; ++i) {
        addresses[i] = static_cast<Rows*>(brought[8 * m + i])->address;
        std::memcpy(matrix[i], row_at(8 * m + i, addresses[i], false, line), 16);
      }
      if (options.counts) counts::matrix_row_group(addresses, line, m == 0);
      for (uint32_t lane = 0; lane < 32; ++lane) {
        static_cast<Rows*>(brought[lane])->rows[m] = held_by(matrix, lane, transposed);
      }
    }
  });
}

void store_matrices(const uint32_t* rows, int count, bool transposed, uint32_t address, Line line) {
  Rows mine{const_cast<uint32_t*>(rows), address};
  meet("stmatrix", kind_store, ~0u, &mine, line, [=](void* const* brought, uint32_t) {
    for (int m = 0; m < count; ++m) {
      Matrix matrix;
      for (uint32_t lane = 0; lane < 32; ++lane) {
        put(matrix, lane, transposed, static_cast<Rows*>(brought[lane])->rows[m]);
      }
      uint32_t addresses[8];
      for (uint32_t i = 0; i < 8; ++i) {
        addresses[i] = static_cast<Rows*>(brought[8 * m + i])->address;
        std::memcpy(row_at(8 * m + i, addresses[i], true, line), matrix[i], 16);
      }
      if (options.counts) counts::matrix_row_group(addresses, line, m == 0);
    }
  });
}

uint32_t transpose_matrix(uint32_t row, Line line) {
  uint32_t mine = row;
  meet("movmatrix", kind_transpose, ~0u, &mine, line, [](void* const* brought, uint32_t) {
    Matrix matrix;
    for (uint32_t lane = 0; lane < 32; ++lane) put(matrix, lane, false, *static_cast<uint32_t*>(brought[lane]));
    for (uint32_t lane = 0; lane < 32; ++lane) *static_cast<uint32_t*>(brought[lane]) = held_by(matrix, lane, true);
  });
  return mine;
}

namespace {

struct Operands {
  float* d;
  const uint32_t *a, *b;
  const float* c;
};

float element(Fragments kind, uint32_t word, int half_of_word) {
  if (kind == Fragments::tf32_k8 || kind == Fragments::tf32_k4) return bits<float>(word & ~0x1fffu);
  const uint16_t u = slice<uint16_t>(word, half_of_word);
  const bool brain = kind == Fragments::bf16_k16 || kind == Fragments::bf16_k8;
  return brain ? float(bits<bfloat16>(u)) : float(bits<half>(u));
}

// A is 16 x K and B is K x 8. Register r of lane l = 4 g + t holds, with `packed` elements to a register, the
// elements k = packed t + h (+ 4 packed for the second half of K) of row g (+ 8 for the odd registers) of A.
template <Fragments kind, int K>
void gather(void* const* brought, float (&A)[16][K], float (&B)[K][8], float (&C)[16][8]) {
  constexpr int packed = kind == Fragments::tf32_k8 || kind == Fragments::tf32_k4 ? 1 : 2, halves = K / (4 * packed);
  for (int lane = 0; lane < 32; ++lane) {
    const auto& x = *static_cast<Operands*>(brought[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half_of_k = 0; half_of_k < halves; ++half_of_k) {
      for (int h = 0; h < packed; ++h) {
        const int k = packed * t + h + 4 * packed * half_of_k;
        A[g][k] = element(kind, x.a[2 * half_of_k], h);
        A[g + 8][k] = element(kind, x.a[2 * half_of_k + 1], h);
        B[k][g] = element(kind, x.b[half_of_k], h);
      }
    }
    for (int i = 0; i < 4; ++i) C[g + 8 * (i / 2)][2 * t + i % 2] = x.c[i];
  }
}

template <Fragments kind, int K>
void multiply_warp(void* const* brought) {
  constexpr int lowest = kind == Fragments::f16_k16 || kind == Fragments::f16_k8 ? -14 : -126;
  float A[16][K], B[K][8], C[16][8], D[16][8];
  gather<kind>(brought, A, B, C);
  products::Row<8> rows[K];
  for (int k = 0; k < K; ++k) rows[k] = products::row(B[k], lowest);
  for (int m = 0; m < 16; ++m) products::add(products::row(A[m], lowest), rows, products::row(C[m], -126), D[m]);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      static_cast<Operands*>(brought[lane])->d[i] = D[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2];
    }
  }
}

}  // namespace

void multiply(Fragments kind, float* d, const uint32_t* a, const uint32_t* b, const float* c, Line line) {
  Operands mine{d, a, b, c};
  meet("mma", kind_multiply, ~0u, &mine, line, [kind](void* const* brought, uint32_t) {
    switch (kind) {
      case Fragments::bf16_k16: return multiply_warp<Fragments::bf16_k16, 16>(brought);
      case Fragments::f16_k16: return multiply_warp<Fragments::f16_k16, 16>(brought);
      case Fragments::bf16_k8: return multiply_warp<Fragments::bf16_k8, 8>(brought);
      case Fragments::f16_k8: return multiply_warp<Fragments::f16_k8, 8>(brought);
      case Fragments::tf32_k8: return multiply_warp<Fragments::tf32_k8, 8>(brought);
      case Fragments::tf32_k4: return multiply_warp<Fragments::tf32_k4, 4>(brought);
    }
  });
}

}  // namespace ptx
