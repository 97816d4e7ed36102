// LayerNorm and RMSNorm with bias, dropout and residual: one read and one write.
//
// The op is bound by memory: x, residual, sum and output move once each, 8 bytes an element in 16 bits, and the hundred
// instructions an element that dropout takes hide behind them. A row lives in the registers of the threads that share
// it, up to 32 elements in each, between the passes over it: its mean, the variance around that mean (two passes, so
// that a large common offset cancels exactly), the output. Up to 1024 columns that is one warp, which needs no barrier;
// longer rows have a block of up to 16 warps. Weight and biases are small and come from the L1 cache.
//
// Threads load 16 bytes at a time, all of a row before the first is used: a multiprocessor must have some 40 KB under
// way to keep the memory busy. Where rows do not start at multiples of 16 bytes they load one element at a time,
// neighbours side by side, which takes more instructions an element: those rows have half as many in a thread.
#include "layer_norm.h"

#include "numeric.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace pytransformer::cuda {
namespace {

constexpr int row_threads = 512;  // at most
template <int N>
constexpr int row_elements = N > 1 ? 32 : 16;  // in one thread, which loads N at a time
constexpr int rows_of_warps = 4;               // rows of a block whose rows are a warp each

template <class T>
struct ForwardArguments {
  const T *input, *residual;
  Parameter<T> weight, bias, input_bias;
  T *output, *sum;
  float *mean, *rstd;
  int64_t rows;
  int columns;
  DropoutArgument dropout;
  float eps;
  bool rms;
};

// Which columns a thread holds: N neighbours at column(i), for each i.
template <int N>
__device__ int column_of(int i) {
  return (i * blockDim.x + threadIdx.x) * N;
}

template <class T, int N, int COUNT>
__device__ void load_row(const T* row, int columns, Pack<T, N> (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (column_of<N>(i) < columns) x[i] = load_pack<T, N>(row + column_of<N>(i));
  }
}

// z = residual + dropout(x + input_bias) of a row; 0 beyond its end. Returns the sum of this thread's part.
template <class T, int N, int COUNT>
__device__ float add_row(const ForwardArguments<T>& a, int64_t row, float (&z)[COUNT][N]) {
  const int64_t start = row * a.columns;
  Pack<T, N> x[COUNT] = {}, residual[COUNT] = {};
  load_row(a.input + start, a.columns, x);
  if (N > 1 && a.residual != nullptr) load_row(a.residual + start, a.columns, residual);
  const Dropout dropout(a.dropout);
  float total = 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int column = column_of<N>(i);
    widen(x[i], z[i]);
    if (column >= a.columns) continue;
    float other[N] = {};
    if (a.input_bias) a.input_bias.load(column, other);
#pragma unroll
    for (int j = 0; j < N; ++j) z[i][j] += other[j];
    dropout.apply(start + column, z[i]);
    if (N == 1 && a.residual != nullptr) residual[i] = load_pack<T, N>(a.residual + start + column);
    widen(residual[i], other);
#pragma unroll
    for (int j = 0; j < N; ++j) z[i][j] += other[j];
    if (a.sum != nullptr) {
      // Backward reads the stored sum: normalise what it will see, not what was rounded away.
      store(a.sum + start + column, z[i]);
#pragma unroll
      for (int j = 0; j < N; ++j) z[i][j] = rounded<T>(z[i][j]);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) total += z[i][j];
  }
  return total;
}

template <class T, int N>
__global__ void __launch_bounds__(row_threads) layer_norm_fwd_kernel(const ForwardArguments<T> a) {
  constexpr int count = row_elements<N> / N;
  __shared__ float scratch[2][1][most_warps];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= a.rows) return;  // only of rows of one warp each, which meet no barrier below
  float z[count][N];
  float total[1] = {add_row(a, row, z)}, squares[1] = {};
  if (!a.rms) row_sums(total, scratch[0]);
  const float mean = a.rms ? 0.0f : total[0] / float(a.columns);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if (column_of<N>(i) >= a.columns) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) squares[0] += (z[i][j] - mean) * (z[i][j] - mean);
  }
  row_sums(squares, scratch[1]);
  const float rstd = 1.0f / sqrtf(squares[0] / float(a.columns) + a.eps);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const int column = column_of<N>(i);
    if (column >= a.columns) continue;
    float y[N], vector[N];
#pragma unroll
    for (int j = 0; j < N; ++j) y[j] = (z[i][j] - mean) * rstd;
    if (a.weight) {
      a.weight.load(column, vector);
#pragma unroll
      for (int j = 0; j < N; ++j) y[j] *= vector[j];
    }
    if (a.bias) {
      a.bias.load(column, vector);
#pragma unroll
      for (int j = 0; j < N; ++j) y[j] += vector[j];
    }
    store(a.output + row * a.columns + column, y);
  }
  if (threadIdx.x == 0) {
    if (a.mean != nullptr) a.mean[row] = mean;
    if (a.rstd != nullptr) a.rstd[row] = rstd;
  }
}

template <class T>
void forward(const LayerNormForward& p, const Launch& launch) {
  const int64_t rows = p.input.shape[0], columns = p.input.shape[1];
  const ForwardArguments<T> a{p.input.ptr<const T>(),
                              p.residual.ptr<const T>(),
                              Parameter<T>(p.weight),
                              Parameter<T>(p.bias),
                              Parameter<T>(p.input_bias),
                              p.output.ptr<T>(),
                              p.sum.ptr<T>(),
                              p.mean.ptr<float>(),
                              p.rstd.ptr<float>(),
                              rows,
                              int(columns),
                              dropout(p.dropout_p, launch),
                              p.eps,
                              p.rms};
  const bool wide = columns % widest<T> == 0 && aligned(p.input, 16) && aligned(p.residual, 16) &&
                    aligned(p.weight, 16) && aligned(p.bias, 16) && aligned(p.input_bias, 16) &&
                    aligned(p.output, 16) && aligned(p.sum, 16);
  const int64_t elements = warp_size * (wide ? row_elements<widest<T>> : row_elements<1>);
  const unsigned threads = unsigned(ceil_div(columns, elements)) * warp_size;
  if (threads > row_threads)
    fail("layer_norm: at most ", elements * row_threads / warp_size, " columns, got ", columns);
  const unsigned together = threads == warp_size ? rows_of_warps : 1;
  const Shape shape{dim3(unsigned(ceil_div(rows, together))), dim3(threads, together)};
  start("layer_norm_fwd", p.input, wide ? layer_norm_fwd_kernel<T, widest<T>> : layer_norm_fwd_kernel<T, 1>, shape,
        launch, a);
}

}  // namespace

void layer_norm_fwd(const LayerNormForward& a, const Launch& launch) {
  by_dtype<float, __half, __nv_bfloat16>("layer_norm", a.input.dtype,
                                         [&](auto zero) { forward<decltype(zero)>(a, launch); });
}

}  // namespace pytransformer::cuda
