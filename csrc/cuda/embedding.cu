// Token, position and segment embeddings, scaled and dropped out, in one pass; a deterministic backward.
//
//     y[n] = dropout(scale * weight[tokens[n]] + positions[n mod T] + segment_weight[segments[n]])
//
// Forward moves a row of the table and of y for each token; positions and segments come from the L2 cache. A row is
// shared by up to 256 threads, 16 bytes each where rows allow it.
//
// Backward adds up the rows of dy that share a token. Atomics would do it in any order; here the tokens are sorted (by
// torch: N indices, little beside N rows), so that the rows of one token are a segment of the sorted order. The threads
// of one row of the table walk over its segment in that order and write the row, zeros where no token asked for it: dy
// is read once and the gradient written once. Long segments, which tables of a few rows have, are cut into parts, whose
// sums the caller adds up. Positions that all sequences share are a table, too, whose segments need no sorting.
#include "embedding.h"

#include "numeric.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace pytransformer::cuda {
namespace {

constexpr int block_threads = 256;

template <class T>
struct Table {
  const T* rows;
  const int64_t* index;  // null: row n takes rows[n mod count]
  int64_t count;
  float scale;

  explicit Table(const EmbeddingTable& t)
      : rows(t.rows.ptr<const T>()), index(t.index.ptr<const int64_t>()), count(t.rows.shape[0]), scale(t.scale) {}
};

template <class T>
struct ForwardArguments {
  Table<T> tokens, positions, segments;
  T* output;
  int64_t rows;
  int columns;
  DropoutArgument dropout;
};

// Adds a table's row for row n. An index outside the table is not followed: it gives NaN.
template <class T, int N>
__device__ void add_row(const Table<T>& table, int64_t n, int column, int columns, float (&y)[N]) {
  if (table.rows == nullptr) return;
  const int64_t row = table.index == nullptr ? n % table.count : table.index[n];
  const bool inside = row >= 0 && row < table.count;
  float x[N] = {};
  if (inside) load(table.rows + row * columns + column, x);
#pragma unroll
  for (int j = 0; j < N; ++j) y[j] += inside ? x[j] * table.scale : nanf("");
}

template <class T, int N>
__global__ void __launch_bounds__(block_threads) embedding_fwd_kernel(const ForwardArguments<T> a) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (n >= a.rows) return;
  const Dropout dropout(a.dropout);
  for (int column = threadIdx.x * N; column < a.columns; column += blockDim.x * N) {
    float y[N] = {};
    add_row(a.tokens, n, column, a.columns, y);
    add_row(a.positions, n, column, a.columns, y);
    add_row(a.segments, n, column, a.columns, y);
    dropout.apply(n * a.columns + column, y);
    store(a.output + n * a.columns + column, y);
  }
}

template <class T, class Out>
struct TableArguments {
  const T* grad_output;
  const int64_t *order, *ends;
  Out* grad;
  int64_t tokens, rows;
  int columns, parts;
  float scale;
  DropoutArgument dropout;
};

// Of four blocks at least: else the compiler spills to fit in more.
template <class T, class Out, int N>
__global__ void __launch_bounds__(block_threads, 4) embedding_table_bwd_kernel(const TableArguments<T, Out> a) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;
  int64_t begin = 0, end = (a.tokens - row + a.rows - 1) / a.rows;  // how often row, row + rows, ... fit below tokens
  if (a.order != nullptr) begin = a.ends[row], end = a.ends[row + 1];
  const int64_t share = (end - begin + a.parts - 1) / a.parts;
  begin = min(begin + int64_t(blockIdx.y) * share, end);
  end = min(begin + share, end);
  const Dropout dropout(a.dropout);
  for (int column = threadIdx.x * N; column < a.columns; column += blockDim.x * N) {
    float total[N] = {};
#pragma unroll 4
    for (int64_t i = begin; i < end; ++i) {
      const int64_t place = (a.order == nullptr ? row + i * a.rows : a.order[i]) * a.columns + column;
      float dy[N];
      load(a.grad_output + place, dy);
      dropout.apply(place, dy);
#pragma unroll
      for (int j = 0; j < N; ++j) total[j] += dy[j];
    }
#pragma unroll
    for (int j = 0; j < N; ++j) total[j] *= a.scale;
    store(a.grad + (int64_t(blockIdx.y) * a.rows + row) * a.columns + column, total);
  }
}

// A row's threads side by side, and as many rows below each other as fill a block.
Shape shape_of(int64_t rows, int64_t columns, int elements, int parts) {
  const int64_t whole = ceil_div(ceil_div(columns, elements), warp_size) * warp_size;
  const unsigned threads = unsigned(std::min<int64_t>(whole, block_threads)), together = block_threads / threads;
  return {dim3(unsigned(ceil_div(rows, together)), unsigned(parts)), dim3(threads, together)};
}

template <class T>
void forward(const EmbeddingForward& p, const Launch& launch) {
  const ForwardArguments<T> a{Table<T>(p.tokens),          Table<T>(p.positions), Table<T>(p.segments),
                              p.output.ptr<T>(),           p.output.shape[0],     int(p.output.shape[1]),
                              dropout(p.dropout_p, launch)};
  const bool wide = a.columns % widest<T> == 0 && aligned(p.tokens.rows, 16) && aligned(p.positions.rows, 16) &&
                    aligned(p.segments.rows, 16) && aligned(p.output, 16);
  start("embedding_fwd", p.output, wide ? embedding_fwd_kernel<T, widest<T>> : embedding_fwd_kernel<T, 1>,
        shape_of(a.rows, a.columns, wide ? widest<T> : 1, 1), launch, a);
}

template <class T, class Out>
void table_backward(const EmbeddingTableBackward& p, const Launch& launch) {
  const TableArguments<T, Out> a{p.grad_output.ptr<const T>(),
                                 p.order.ptr<const int64_t>(),
                                 p.ends.ptr<const int64_t>(),
                                 p.grad.ptr<Out>(),
                                 p.grad_output.shape[0],
                                 p.grad.shape[1],
                                 int(p.grad.shape[2]),
                                 int(p.grad.shape[0]),
                                 p.scale,
                                 dropout(p.dropout_p, launch)};
  constexpr int wide = widest<T>;
  const bool fits = a.columns % wide == 0 && aligned(p.grad_output, 16) && aligned(p.grad, sizeof(Out) * wide);
  start("embedding_table_bwd", p.grad,
        fits ? embedding_table_bwd_kernel<T, Out, wide> : embedding_table_bwd_kernel<T, Out, 1>,
        shape_of(a.rows, a.columns, fits ? wide : 1, a.parts), launch, a);
}

}  // namespace

void embedding_fwd(const EmbeddingForward& p, const Launch& launch) {
  by_dtype<float, __half, __nv_bfloat16>("embedding", p.output.dtype,
                                         [&](auto zero) { forward<decltype(zero)>(p, launch); });
}

void embedding_table_bwd(const EmbeddingTableBackward& p, const Launch& launch) {
  by_dtype<float, __half, __nv_bfloat16>("embedding", p.grad_output.dtype, [&](auto zero) {
    using T = decltype(zero);
    p.grad.dtype == DType::float32 ? table_backward<T, float>(p, launch) : table_backward<T, T>(p, launch);
  });
}

}  // namespace pytransformer::cuda
