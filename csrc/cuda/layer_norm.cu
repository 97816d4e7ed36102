// LayerNorm and RMSNorm with bias, dropout and residual: one read and one write.
//
// The op is bound by memory: x, residual, sum and output move once each, 8 bytes an element in 16 bits. With everything
// at once it is not far from being bound by instructions (an H200 has time for some forty an element), so that most of
// what follows is about those. A row lives in the registers of the threads that share it, up to 32 elements in each,
// between the passes over it: its mean, the variance around that mean (two passes, so that a large common offset
// cancels exactly), the output. Up to 1024 columns that is one warp, which needs no barrier; longer rows have a block
// of up to 16 warps. Each warp has a run of columns of its own, so that all addresses are one and constants. Each
// optional part is one loop over what a thread holds, so that it is asked for once. Weight and biases are small and
// come from the L1 cache.
//
// Threads load 16 bytes at a time, all of a row before the first is used: a multiprocessor must have some 40 KB under
// way to keep the memory busy. Where rows do not start at multiples of 16 bytes they load one element at a time,
// neighbours side by side, which takes more instructions an element: those rows have half as many in a thread.
#include "layer_norm.h"

#include "layer_norm_row.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace pytransformer::cuda {
namespace {

constexpr int row_threads = 512;  // at most
constexpr int rows_of_warps = 4;  // rows of a block whose rows are a warp each

template <class T>
struct ForwardArguments {
  const T *input, *residual;
  Parameter<T> weight, bias, input_bias;
  T *output, *sum;
  float *mean, *rstd;
  int64_t rows;
  int columns;
  float inverse_columns;
  DropoutArgument dropout;
  float eps;
  bool rms;
};

// z = residual + dropout(x + input_bias) of a row; 0 beyond its end.
template <class T, int N, int COUNT>
__device__ void add_row(const ForwardArguments<T>& a, const Row<T, N, COUNT>& row, int64_t start,
                        float (&z)[COUNT][N]) {
  Pack<T, N> x[COUNT] = {}, residual[COUNT] = {};
  row.load(a.input + start, x);
  if (a.residual != nullptr) row.load(a.residual + start, residual);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) widen(x[i], z[i]);
  row.with(a.input_bias, z, [](float& z, float bias) { z += bias; });
  Dropout(a.dropout).apply(start + row.column(0), row.step, z);
  if (a.residual != nullptr) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      float other[N];
      widen(residual[i], other);
#pragma unroll
      for (int j = 0; j < N; ++j) z[i][j] += other[j];
    }
  }
  if (a.sum != nullptr) {
    // Backward reads the stored sum: normalise what it will see, not what was rounded away.
    Pack<T, N> sum[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      sum[i] = narrow<T>(z[i]);
      widen(sum[i], z[i]);
    }
    row.each([&](int i) { store_pack(a.sum + start + row.column(i), sum[i]); });
  }
}

// Of one block at least: else the compiler spills to fit in more.
template <class T, int N, int COUNT>
__global__ void __launch_bounds__(row_threads, 1) layer_norm_fwd_kernel(const ForwardArguments<T> a) {
  __shared__ float scratch[2][1][most_warps];
  const int64_t index = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, start = index * a.columns;
  if (index >= a.rows) return;  // only of rows of one warp each, which meet no barrier below
  const Row<T, N, COUNT> row(a.columns);
  float z[COUNT][N], total[1] = {}, squares[1] = {};
  add_row(a, row, start, z);
  if (!a.rms) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
      for (int j = 0; j < N; ++j) total[0] += z[i][j];
    }
    row_sums(total, scratch[0]);
  }
  const float mean = a.rms ? 0.0f : total[0] / float(a.columns);
  row.each([&](int i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      z[i][j] -= mean;
      squares[0] += z[i][j] * z[i][j];
    }
  });
  row_sums(squares, scratch[1]);
  const float rstd = rsqrtf(squares[0] * a.inverse_columns + a.eps);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) z[i][j] *= rstd;
  }
  row.with(a.weight, z, [](float& z, float weight) { z *= weight; });
  row.with(a.bias, z, [](float& z, float bias) { z += bias; });
  row.each([&](int i) { store(a.output + start + row.column(i), z[i]); });
  if (threadIdx.x == 0) {
    if (a.mean != nullptr) a.mean[index] = mean;
    if (a.rstd != nullptr) a.rstd[index] = rstd;
  }
}

template <class T, int N>
auto kernel_for(int elements) {
  if constexpr (N > 1) {
    if (elements == 32) return layer_norm_fwd_kernel<T, N, 32 / N>;
    if (elements == 24) return layer_norm_fwd_kernel<T, N, 24 / N>;
    if (elements == 16) return layer_norm_fwd_kernel<T, N, 16 / N>;
    return layer_norm_fwd_kernel<T, N, 8 / N>;
  } else {
    return elements == 16 ? layer_norm_fwd_kernel<T, 1, 16> : layer_norm_fwd_kernel<T, 1, 8>;
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
                              1.0f / float(columns),
                              dropout(p.dropout_p, launch),
                              p.eps,
                              p.rms};
  const bool wide = columns % widest<T> == 0 && aligned(p.input, 16) && aligned(p.residual, 16) &&
                    aligned(p.weight, 16) && aligned(p.bias, 16) && aligned(p.input_bias, 16) &&
                    aligned(p.output, 16) && aligned(p.sum, 16);
  const int elements =
      wide ? fullest(columns, row_threads, false, {32, 24, 16, 8}) : fullest(columns, row_threads, false, {16, 8});
  const unsigned threads = unsigned(ceil_div(columns, warp_size * elements)) * warp_size;
  if (threads > row_threads) fail("layer_norm: at most ", row_threads * elements, " columns, got ", columns);
  const unsigned together = threads == warp_size ? rows_of_warps : 1;
  const Shape shape{dim3(unsigned(ceil_div(rows, together))), dim3(threads, together)};
  start("layer_norm_fwd", p.input, wide ? kernel_for<T, widest<T>>(elements) : kernel_for<T, 1>(elements), shape,
        launch, a);
}

}  // namespace

void layer_norm_fwd(const LayerNormForward& a, const Launch& launch) {
  by_dtype<float, __half, __nv_bfloat16>("layer_norm", a.input.dtype,
                                         [&](auto zero) { forward<decltype(zero)>(a, launch); });
}

}  // namespace pytransformer::cuda
