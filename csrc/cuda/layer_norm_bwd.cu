// The backward of layer_norm and RMSNorm: one launch for the gradients of the rows and of the parameters.
//
//     xhat = (sum - mean) * rstd,  g = grad_output * weight
//     grad_residual = rstd * (g - mean(g) - xhat * mean(g * xhat)) + what reached sum from elsewhere
//     grad_input = dropout(grad_residual)
//     gradients of weight, bias, input_bias: column sums of grad_output * xhat, grad_output, grad_input
//
// Bound by memory like the forward: 6 bytes an element in 16 bits, 8 with dropout. The column sums are what makes it
// hard. Here one block lives on each multiprocessor and walks over the rows, several at a time, in a fixed order; a
// thread keeps to its columns, eight of them, and their sums stay in its registers until the last row. Then the rows of
// the block are added up in shared memory, and the blocks by those that finish last (sum_over_blocks): no atomic sums,
// no second launch, the same bits in every run.
//
// Rows of up to 4096 columns give a thread eight of them, and 24 of its 128 registers are sums. Rows of up to 8192 give
// it sixteen; there the sums of input_bias lie in memory, where the L2 cache holds them, and beyond 8192 columns all
// sums do. What a row needs is kept as it was loaded, in 16 bits, and widened twice; up to 4096 columns the next row is
// on its way meanwhile.
#include "layer_norm.h"
#include "numeric.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace pytransformer::cuda {
namespace {

constexpr int block_threads = 512;
constexpr int few = 8, some = 16, many = 32;  // elements of a row in one thread

enum { of_weight, of_bias, of_input_bias, kinds };  // the three column sums

template <class T>
struct BackwardArguments {
  const T *grad_output, *grad_sum, *sum;
  Parameter<T> weight;
  const float *mean, *rstd;
  T *grad_residual, *grad_input;
  float* column_sums[kinds];  // null where not wanted
  BlockSums blocks;           // rows of [kinds][columns]
  int64_t rows;
  int columns;
  DropoutArgument dropout;
  bool rms;
};

template <int N>
__device__ int column_of(int i) {
  return (i * blockDim.x + threadIdx.x) * N;
}

// A thread's part of one row.
template <class T, int N, int COUNT>
struct Part {
  Pack<T, N> grad_output[COUNT] = {}, sum[COUNT] = {};
  float mean = 0, rstd = 0;

  __device__ void load(const BackwardArguments<T>& a, int64_t row) {
    if (row >= a.rows) return;
    mean = a.rms ? 0.0f : a.mean[row];
    rstd = a.rstd[row];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (column_of<N>(i) >= a.columns) continue;
      grad_output[i] = load_pack<T, N>(a.grad_output + row * a.columns + column_of<N>(i));
      sum[i] = load_pack<T, N>(a.sum + row * a.columns + column_of<N>(i));
    }
  }

  // grad_output, grad_output * weight, xhat.
  __device__ void normalized(const BackwardArguments<T>& a, int i, float (&dy)[N], float (&g)[N],
                             float (&xhat)[N]) const {
    widen(grad_output[i], dy);
    widen(sum[i], xhat);
    if (a.weight) a.weight.load(column_of<N>(i), g);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      g[j] = a.weight ? g[j] * dy[j] : dy[j];
      xhat[j] = (xhat[j] - mean) * rstd;
    }
  }
};

// A thread's column sums: the first KEPT kinds in registers, the others in the block's row of partial sums in memory,
// where the block has no second row that would add to the same places.
template <int N, int COUNT, int KEPT>
struct ColumnSums {
  float values[KEPT > 0 ? KEPT : 1][COUNT][N] = {};
  float* memory;
  int columns;

  template <int KIND>
  __device__ void add(int i, const float (&x)[N]) {
    if constexpr (KIND < KEPT) {
#pragma unroll
      for (int j = 0; j < N; ++j) values[KIND][i][j] += x[j];
    } else {
      float* place = memory + KIND * columns + column_of<N>(i);
#pragma unroll
      for (int j = 0; j < N; ++j) place[j] += x[j];
    }
  }
};

// The gradients of one row, from the means of g and of g * xhat.
template <class T, int N, int COUNT, class Sums>
__device__ void write_row(const BackwardArguments<T>& a, const Part<T, N, COUNT>& part, int64_t row, float g_mean,
                          float gx_mean, const Dropout& dropout, Sums& sums) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int column = column_of<N>(i);
    if (COUNT > 1) __syncwarp();  // keeps the compiler from loading for the next i ahead: registers are short
    if (column >= a.columns) continue;
    const int64_t place = row * a.columns + column;
    float dy[N], g[N], xhat[N];
    part.normalized(a, i, dy, g, xhat);
    if (a.column_sums[of_bias] != nullptr) sums.template add<of_bias>(i, dy);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      g[j] = (g[j] - g_mean - xhat[j] * gx_mean) * part.rstd;
      xhat[j] *= dy[j];
    }
    if (a.column_sums[of_weight] != nullptr) sums.template add<of_weight>(i, xhat);
    if (a.grad_sum != nullptr) {
      load(a.grad_sum + place, xhat);
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] += xhat[j];
    }
    store(a.grad_residual + place, g);
    dropout.apply(place, g);
    if (a.grad_input != nullptr) store(a.grad_input + place, g);
    if (a.column_sums[of_input_bias] != nullptr) sums.template add<of_input_bias>(i, g);
  }
}

// The sums of the rows that the block's threads took side by side, into the block's row of partial sums.
template <int N, int COUNT, int KEPT>
__device__ void sum_over_rows(const ColumnSums<N, COUNT, KEPT>& sums, float* const (&wanted)[kinds]) {
  extern __shared__ float rows[];  // [blockDim.y][columns]
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
#pragma unroll
  for (int kind = 0; kind < KEPT; ++kind) {
    if (wanted[kind] == nullptr) continue;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (column_of<N>(i) >= sums.columns) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) rows[threadIdx.y * sums.columns + column_of<N>(i) + j] = sums.values[kind][i][j];
    }
    __syncthreads();
    for (int c = thread; c < sums.columns; c += threads) {
      float total = 0;
      for (int y = 0; y < blockDim.y; ++y) total += rows[y * sums.columns + c];
      sums.memory[kind * sums.columns + c] = total;
    }
  }
}

template <class T, int N, int ELEMENTS>
__global__ void __launch_bounds__(block_threads) layer_norm_bwd_kernel(const BackwardArguments<T> a) {
  constexpr int count = ELEMENTS / N;
  constexpr int kept = ELEMENTS == few ? kinds : ELEMENTS == some ? of_input_bias : 0;
  constexpr bool ahead = ELEMENTS == few;
  __shared__ float scratch[2][2][most_warps];
  ColumnSums<N, count, kept> sums;
  sums.memory = a.blocks.partial + int64_t(blockIdx.x) * a.blocks.width;
  sums.columns = a.columns;
  if constexpr (kept < kinds) {
    for (int c = kept * a.columns + threadIdx.x; c < a.blocks.width; c += blockDim.x) sums.memory[c] = 0;
    __syncthreads();
  }
  const Dropout dropout(a.dropout);
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  int turn = 0;
  Part<T, N, count> part;
  if (ahead) part.load(a, int64_t(blockIdx.x) * blockDim.y + threadIdx.y);
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < a.rows; first += step) {
    const int64_t row = first + threadIdx.y;
    Part<T, N, count> next;
    ahead ? next.load(a, row + step) : part.load(a, row);
    float means[2] = {};  // of g and of g * xhat
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (column_of<N>(i) >= a.columns) continue;
      float dy[N], g[N], xhat[N];
      part.normalized(a, i, dy, g, xhat);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        means[0] += g[j];
        means[1] += g[j] * xhat[j];
      }
    }
    row_sums(means, scratch[turn]);
    turn ^= 1;
    const float g_mean = a.rms ? 0.0f : means[0] / float(a.columns);
    if (row < a.rows) write_row(a, part, row, g_mean, means[1] / float(a.columns), dropout, sums);
    if (ahead) part = next;
  }
  if constexpr (kept > 0) sum_over_rows(sums, a.column_sums);
  sum_over_blocks(a.blocks, blockIdx.x, [&](int c, float sum) {
    float* out = a.column_sums[c / a.columns];
    if (out != nullptr) out[c % a.columns] = sum;
  });
}

template <class T, int N>
auto kernel_for(int elements) {
  if (elements == few) return layer_norm_bwd_kernel<T, N, few>;
  if constexpr (N > 1) {
    if (elements == many) return layer_norm_bwd_kernel<T, N, many>;
  }
  return layer_norm_bwd_kernel<T, N, some>;
}

template <class T, int N>
void backward(const LayerNormBackward& p, const Launch& launch) {
  const int64_t rows = p.sum.shape[0], columns = p.sum.shape[1];
  const int most = N > 1 ? many : some;
  const int elements = columns <= block_threads * few ? few : columns <= block_threads * some ? some : most;
  if (columns > block_threads * most) fail("layer_norm: at most ", block_threads * most, " columns, got ", columns);
  const unsigned threads = unsigned(ceil_div(columns, warp_size * elements)) * warp_size;
  const unsigned together = block_threads / threads;
  const int blocks = int(std::min<int64_t>(ceil_div(rows, together), multiprocessors()));
  const int64_t needed = int64_t(blocks) * kinds * columns * int64_t(sizeof(float));
  check_workspace("layer_norm_bwd", launch, needed, BlockSums::groups(blocks) + 1);
  const BackwardArguments<T> a{p.grad_output.ptr<const T>(),
                               p.grad_sum.ptr<const T>(),
                               p.sum.ptr<const T>(),
                               Parameter<T>(p.weight),
                               p.mean.ptr<const float>(),
                               p.rstd.ptr<const float>(),
                               p.grad_residual.ptr<T>(),
                               p.grad_input.ptr<T>(),
                               {p.grad_weight.ptr<float>(), p.grad_bias.ptr<float>(), p.grad_input_bias.ptr<float>()},
                               {launch.workspace.ptr<float>(), launch.counters.ptr<int>(), int(kinds * columns), blocks,
                                BlockSums::group_of(blocks)},
                               rows,
                               int(columns),
                               dropout(p.dropout_p, launch),
                               p.rms};
  const size_t shared_bytes = elements < many ? size_t(together * columns) * sizeof(float) : 0;
  const Shape shape{dim3(unsigned(blocks)), dim3(threads, together), shared_bytes};
  start("layer_norm_bwd", p.sum, kernel_for<T, N>(elements), shape, launch, a);
}

}  // namespace

void layer_norm_bwd(const LayerNormBackward& p, const Launch& launch) {
  by_dtype<float, __half, __nv_bfloat16>("layer_norm", p.sum.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool wide = p.sum.shape[1] % widest<T> == 0 && aligned(p.grad_output, 16) && aligned(p.grad_sum, 16) &&
                      aligned(p.sum, 16) && aligned(p.weight, 16) && aligned(p.grad_residual, 16) &&
                      aligned(p.grad_input, 16);
    wide ? backward<T, widest<T>>(p, launch) : backward<T, 1>(p, launch);
  });
}

}  // namespace pytransformer::cuda
