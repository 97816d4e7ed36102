// Matrix product for few columns: C[M,N] = A[M,K] B[K,N] where N is a handful of tokens and A a weight.
//
// gemm.h puts columns in lanes, which a decoding step has too few of, and where the type of A is not the tile's it
// packs all of A, which then costs far more than the product. Here k lies in lanes: a vector of A is read once,
// where it lies, widened in registers unless it is operands already, and multiplied with as many vectors of B as there
// are columns. B is kept as operands with its columns along k; a block of depth of it stays in L1 while rows of A pass
// by:
//
//     for narrow_share rows of A:                     a task
//       for a block of depth:                         A[rows, depth]: from memory, once, then from L2
//         for narrow_columns columns of B:            B[depth, columns]: 32 KB, from L1
//           for narrow_rows rows of A:                the next rows are asked for meanwhile
//             acc += A B                              rows x columns accumulators in registers
//             sums += the lanes of acc, added up
//
// Of one or two columns, as in decoding, the time is that of reading A: where that is faster, whole rows of it are read
// one after the other.
//
// The sum of an element is formed in as many parts as there are lanes, of short runs, then over blocks of depth: more
// accurate than one running sum, as a product of few rows is by other libraries. It does not depend on the threads.
// The time is that of reading A, or of Rows * Columns multiply-adds for Rows + Columns loads.
#pragma once

#include "gemm.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"
#include "simd.h"

namespace pytransformer::PYTRANSFORMER_ISA {

constexpr int narrow_rows = 3, narrow_columns = tile_vecs == 4 ? 8 : 3;  // accumulators that fit in the registers
// Up to so many A is read from one address to the next, as a Zen 4 reads memory fastest. The Xeons that have AMX read
// narrow_rows rows side by side in 0.7 to 0.95 of that time, from memory and from caches.
constexpr int64_t sequential_columns = on_unit<bfloat16> ? 0 : 2;
template <class Operand>
constexpr int64_t narrow_vector = Vec::lanes * depth_step<Operand>;  // how many k a vector holds
template <class Operand>
constexpr int64_t narrow_depth = 64 * narrow_vector<Operand>;  // of 64 vectors; B for the columns of a tile is 32 KB
constexpr int64_t narrow_share = 48;                    // rows of A for a task; divisible by narrow_rows and by lanes
constexpr int64_t most_narrow_rows = 5 * narrow_share;  // where sharing costs more than it saves
static_assert(narrow_share % narrow_rows == 0 && narrow_share % Vec::lanes == 0);

// Up to how many columns this is the faster way. Beyond, A that is not in the tile's type is worth packing.
template <class T>
constexpr int64_t few_columns = on_unit<operand_t<T>>               ? 4
                                : sizeof(T) == sizeof(operand_t<T>) ? 16
                                                                    : 48;

// B as the tiles read it: [columns in groups][vectors of k][columns of a group][narrow_vector], with zeros beyond K. A
// group has narrow_columns, or, where A is read from one address to the next, all columns there are.
template <class Operand>
class NarrowRight {
  static constexpr int64_t vector = narrow_vector<Operand>;

 public:
  // Yet to be written, by store_depths.
  NarrowRight(int64_t columns, int64_t K)
      : group_(columns <= sequential_columns ? columns : narrow_columns),
        depth_(round_up(K, vector)),
        data_((columns > 0 ? round_up(columns, group_) : 0) * depth_),
        K_(K) {
    for (int64_t j = 0; j < columns && K < depth_; ++j) {
      for (int64_t k = depth_ - vector; k < depth_; k += Vec::lanes) Vec::zero().store(at(j, k));
    }
  }

  // B = rows^T: row j of the matrix in memory is column j.
  template <class T>
  NarrowRight(const T* rows, int64_t stride, int64_t columns, int64_t K) : NarrowRight(columns, K) {
    for (int64_t j = 0; j < columns; ++j) {
      for_vectors(K, [&](int64_t k, int n) { load(rows + j * stride + k, n).store(at(j, k)); });
    }
  }

  // B[k + i, first + j] = values[i * block_columns + j] for i < depths, j < count; k begins a vector.
  void store_depths(int64_t k, int64_t depths, int64_t first, int64_t count, const float* values) const {
    turn(
        depths, count, [&](int64_t i, int64_t j) { return Vec::load(values + i * block_columns + j); },
        [&](int64_t j, int64_t i, Vec v, int) { v.store(at(first + j, k + i)); });
  }

  int64_t K() const { return K_; }
  // Where element k of a column lies.
  Operand* at(int64_t column, int64_t k) const {
    return data_.get() + column / group_ * group_ * depth_ + k / vector * vector * group_ + column % group_ * vector +
           k % vector;
  }

 private:
  int64_t group_, depth_;
  Scratch<Operand> data_;
  int64_t K_;
};

// sums[i][j] (+)= the sum of the lanes of acc[i][j]
template <int Rows, int Columns>
inline __attribute__((always_inline)) void add_lanes(const Vec (&acc)[Rows][Columns], float* sums, bool add) {
  constexpr int count = Rows * Columns, padded = (count + Vec::lanes - 1) / Vec::lanes * Vec::lanes;
  float totals[padded];
#pragma GCC unroll 3
  for (int first = 0; first < padded; first += Vec::lanes) {
    Vec together[Vec::lanes];
#pragma GCC unroll 16
    for (int i = 0; i < Vec::lanes; ++i) {
      const int at = first + i;
      together[i] = at < count ? acc[at / Columns][at % Columns] : Vec::zero();
    }
    sums_of_lanes(together).store(totals + first);
  }
  for (int i = 0; i < Rows; ++i) {
    if (add) add_row(totals + i * Columns, sums + i * block_columns, Columns);
    copy_row(totals + i * Columns, Columns, sums + i * block_columns);
  }
}

// Has the compiler load `x` once, not anew for each multiply-add that reads it: there are more of these than loads.
inline __attribute__((always_inline)) void keep_in_register(Vec& x) {
#if defined(__x86_64__)
  asm("" : "+v"(x.v));
#elif defined(PYTRANSFORMER_NEON)
  asm("" : "+w"(x.v));
#endif
}

// sums[i][j] (+)= the product of row i of A and column j of B over `depth` values of k.
template <class T, class Operand, int Rows, int Columns>
__attribute__((noinline)) void narrow_product(const T* a, int64_t a_stride, const Operand* b, int64_t depth,
                                              float* sums, bool add) {
  constexpr int64_t vector = narrow_vector<Operand>;
  constexpr Operand* kind = nullptr;
  Vec acc[Rows][Columns];
  clear(acc);
  const auto step = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    Vec row[Rows];
#pragma GCC unroll 3
    for (int i = 0; i < Rows; ++i) row[i] = load_operands(a + i * a_stride + k, n, kind);
#pragma GCC unroll 8
    for (int j = 0; j < Columns; ++j) {
      Vec x = load_operands(b + k * narrow_columns + j * vector, vector, kind);
      keep_in_register(x);
#pragma GCC unroll 3
      for (int i = 0; i < Rows; ++i) acc[i][j] = multiply_operands(row[i], x, acc[i][j], kind);
    }
  };
  int64_t k = 0;
  for (; k + vector <= depth; k += vector) {
    for (int i = 0; i < Rows; ++i) __builtin_prefetch(a + (Rows + i) * a_stride + k);
    step(k, vector);
  }
  if (k < depth) step(k, depth - k);
  add_lanes(acc, sums, add);
}

// The product of up to a vector's lanes of rows of A and one or two columns of B, one row after the other: the time is
// that of reading A, which hardware reads fastest from one address to the next. `parts` sums run side by side.
template <class T, class Operand, int Columns>
__attribute__((noinline)) void sequential_product(const T* a, int64_t a_stride, int64_t rows, const Operand* b,
                                                  int64_t K, float* sums) {
  constexpr int64_t vector = narrow_vector<Operand>;
  constexpr int parts = 8 / Columns;
  constexpr Operand* kind = nullptr;
  Vec totals[Columns][Vec::lanes];
  for (int64_t i = 0; i < Vec::lanes; ++i) {
    Vec acc[Columns][parts];
    clear(acc);
    const T* row = a + i * a_stride;
    const auto step = [&](int64_t k, int64_t n, int part) __attribute__((always_inline)) {
      const Vec x = load_operands(row + k, n, kind);
#pragma GCC unroll 2
      for (int j = 0; j < Columns; ++j) {
        const Vec y = load_operands(b + k * Columns + j * vector, vector, kind);
        acc[j][part] = multiply_operands(x, y, acc[j][part], kind);
      }
    };
    int64_t k = 0;
    for (; i < rows && k + parts * vector <= K; k += parts * vector) {
#pragma GCC unroll 8
      for (int part = 0; part < parts; ++part) step(k + part * vector, vector, part);
    }
    for (; i < rows && k < K; k += vector) step(k, K - k < vector ? K - k : vector, 0);
    for (int j = 0; j < Columns; ++j) {
#pragma GCC unroll 3
      for (int half = parts / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
        for (int part = 0; part < half; ++part) acc[j][part] = acc[j][part] + acc[j][part + half];
      }
      totals[j][i] = acc[j][0];
    }
  }
  for (int j = 0; j < Columns; ++j) {
    float found[Vec::lanes];
    sums_of_lanes(totals[j]).store(found);
    for (int64_t i = 0; i < rows; ++i) sums[i * block_columns + j] = found[i];
  }
}

// sums = rows x columns of the product, for at most sequential_columns columns.
template <class T, class Operand>
void sequential_rows(const T* a, int64_t stride, int64_t rows, int64_t N, const NarrowRight<Operand>& right,
                     float* sums) {
  const auto product = N == 1 ? sequential_product<T, Operand, 1> : sequential_product<T, Operand, 2>;
  for (int64_t i = 0; i < rows; i += Vec::lanes) {
    const int64_t count = rows - i < Vec::lanes ? rows - i : Vec::lanes;
    product(a + i * stride, stride, count, right.at(0, 0), right.K(), sums + i * block_columns);
  }
}

template <class T, class Operand>
struct NarrowProducts {
  template <int Rows, int Columns>
  static constexpr auto of = &narrow_product<T, Operand, Rows, Columns>;
};

// The same for more columns, a block of depth at a time.
template <class T, class Operand>
void narrow_block(const T* a, int64_t stride, int64_t rows, int64_t N, const NarrowRight<Operand>& right, float* sums) {
  const int64_t K = right.K();
  int64_t k = 0;
  do {  // once even for K = 0, to clear the sums
    const int64_t now = K - k < narrow_depth<Operand> ? K - k : narrow_depth<Operand>;
    for (int64_t j = 0; j < N; j += narrow_columns) {
      for (int64_t i = 0; i < rows; i += narrow_rows) {
        const auto product = instance_for<NarrowProducts<T, Operand>, narrow_rows, narrow_columns>(rows - i, N - j);
        product(a + i * stride + k, stride, right.at(j, k), now, sums + i * block_columns + j, k > 0);
      }
    }
    k += narrow_depth<Operand>;
  } while (k < K);
}

// How many rows of A a task has: the more in a row the faster they are read, where that is what costs.
inline int64_t rows_of_task(int64_t M, int64_t N, int64_t K) {
  if (double(M) * double(N) * double(K) <= 1e6) return most_narrow_rows;
  const int64_t even = N <= sequential_columns ? round_up(M / (4 * max_threads()), Vec::lanes) : narrow_share;
  return even < narrow_share ? narrow_share : even > most_narrow_rows ? most_narrow_rows : even;
}

// epilogue(block, sums) as gemm has it, for A [M,K] in memory with its rows `stride` apart; N <= block_columns.
template <class T, class Operand, class Epilogue>
void narrow_gemm(int64_t M, int64_t N, const T* a, int64_t stride, const NarrowRight<Operand>& right,
                 const Epilogue& epilogue) {
  if (M <= 0 || N <= 0) return;
  const int64_t share = rows_of_task(M, N, right.K());
  const ThreadScratch<float> memory(max_threads(), share * block_columns);

  parallel_tasks(ceil_div(M, share), [&](int64_t task) {
    float* sums = memory.of(thread_index());
    const int64_t first = task * share, rows = M - first < share ? M - first : share;
    if (N <= sequential_columns) {
      sequential_rows(a + first * stride, stride, rows, N, right, sums);
    } else {
      narrow_block(a + first * stride, stride, rows, N, right, sums);
    }
    epilogue(Block{first, 0, rows, N}, sums);
  });
}

}  // namespace pytransformer::PYTRANSFORMER_ISA
