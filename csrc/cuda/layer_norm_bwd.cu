// The backward of layer_norm and RMSNorm: one launch for the gradients of the rows and of the parameters.
//
//     xhat = (sum - mean) * rstd,  g = grad_output * weight
//     grad_residual = rstd * (g - mean(g) - xhat * mean(g * xhat)) + what reached sum from elsewhere
//     grad_input = dropout(grad_residual)
//     gradients of weight, bias, input_bias: column sums of grad_output * xhat, grad_output, grad_input
//
// Bound by memory like the forward, 6 bytes an element in 16 bits, 8 with dropout, and as near to being bound by
// instructions. The column sums are what makes it hard. One block of 256 threads lives on each multiprocessor, with 255
// registers a thread; each of its eight warps walks over rows of its own in a fixed order, and keeps to its columns, up
// to 32 in a thread, whose three sums stay in registers until the last row. Rows of up to 1024 columns are one warp's,
// which needs no barrier; longer ones are shared by up to eight warps. At the end the rows of the block are added up in
// shared memory, and the blocks by those that finish last (sum_over_blocks): no atomic sums, no second launch, the same
// bits in every run. Rows beyond that have blocks of 512 threads, whose sums lie in memory, in the L2 cache.
//
// What a row needs is kept as it was loaded, in 16 bits, and widened twice; the next row is on its way meanwhile, where
// registers last.
#include "layer_norm.h"
#include "layer_norm_row.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace pytransformer::cuda {
namespace {

constexpr int sum_threads = 256;   // of a block whose column sums are in registers
constexpr int most_threads = 512;  // of one whose sums are in memory

// Blocks of which a multiprocessor holds at least so many; 0 where the compiler may take the registers of one.
constexpr int blocks_of(int elements) {
  return elements <= 8 ? 2 : 0;
}

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
  float inverse_columns;
  DropoutArgument dropout;
  bool rms;
};

// A thread's part of one row.
template <class T, int N, int COUNT>
struct Part {
  Pack<T, N> grad_output[COUNT] = {}, sum[COUNT] = {};
  float mean = 0, rstd = 0;

  __device__ void load(const BackwardArguments<T>& a, const Row<T, N, COUNT>& columns, int64_t row) {
    if (row >= a.rows) return;
    columns.load(a.grad_output + row * a.columns, grad_output);
    columns.load(a.sum + row * a.columns, sum);
    mean = a.rms ? 0.0f : a.mean[row];
    rstd = a.rstd[row];
  }

  // grad_output, grad_output * weight, xhat of pack i.
  __device__ void normalized(const Parameter<T>& weight, int column, bool inside, int i, float (&dy)[N], float (&g)[N],
                             float (&xhat)[N]) const {
    widen(grad_output[i], dy);
    widen(sum[i], xhat);
    if (weight && inside) weight.load(column, g);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      g[j] = weight && inside ? g[j] * dy[j] : dy[j];
      xhat[j] = (xhat[j] - mean) * rstd;
    }
  }
};

// A thread's column sums, in registers or in the block's row of partial sums in memory; there the block has no second
// row that would add to the same places.
template <int N, int COUNT, bool REGISTERS>
struct ColumnSums {
  float values[REGISTERS ? kinds : 1][COUNT][N] = {};
  float* memory;
  int columns;

  template <int KIND>
  __device__ void add(int i, int column, const float (&x)[N]) {
    if constexpr (REGISTERS) {
#pragma unroll
      for (int j = 0; j < N; ++j) values[KIND][i][j] += x[j];
    } else if (column < columns) {
      float* place = memory + KIND * columns + column;
#pragma unroll
      for (int j = 0; j < N; ++j) place[j] += x[j];
    }
  }
};

// The gradients of one row, from the means of g and of g * xhat. What is computed beyond the row's end goes nowhere.
template <class T, int N, int COUNT, class Sums>
__device__ void write_row(const BackwardArguments<T>& a, const Row<T, N, COUNT>& columns, const Part<T, N, COUNT>& part,
                          int64_t row, float g_mean, float gx_mean, const Dropout& dropout, Sums& sums) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int column = columns.column(i);
    const int64_t place = row * a.columns + column;
    float dy[N], g[N], xhat[N];
    part.normalized(a.weight, column, columns.inside(i), i, dy, g, xhat);
    if (a.column_sums[of_bias] != nullptr) sums.template add<of_bias>(i, column, dy);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      g[j] = (g[j] - g_mean - xhat[j] * gx_mean) * part.rstd;
      xhat[j] *= dy[j];
    }
    if (a.column_sums[of_weight] != nullptr) sums.template add<of_weight>(i, column, xhat);
    if (a.grad_sum != nullptr && columns.inside(i)) {
      load(a.grad_sum + place, xhat);
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] += xhat[j];
    }
    if (columns.inside(i)) store(a.grad_residual + place, g);
    dropout.apply(place, g);
    if (a.grad_input != nullptr && columns.inside(i)) store(a.grad_input + place, g);
    if (a.column_sums[of_input_bias] != nullptr) sums.template add<of_input_bias>(i, column, g);
  }
}

// The sums of the rows that the block's threads took side by side, into the block's row of partial sums.
template <class T, int N, int COUNT>
__device__ void sum_over_rows(const Row<T, N, COUNT>& columns, const ColumnSums<N, COUNT, true>& sums,
                              float* const (&wanted)[kinds]) {
  extern __shared__ float rows[];  // [blockDim.y][columns]
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
#pragma unroll
  for (int kind = 0; kind < kinds; ++kind) {
    if (wanted[kind] == nullptr) continue;
    __syncthreads();
    columns.each([&](int i) {
#pragma unroll
      for (int j = 0; j < N; ++j) rows[threadIdx.y * sums.columns + columns.column(i) + j] = sums.values[kind][i][j];
    });
    __syncthreads();
    for (int c = thread; c < sums.columns; c += threads) {
      float total = 0;
      for (int y = 0; y < blockDim.y; ++y) total += rows[y * sums.columns + c];
      sums.memory[kind * sums.columns + c] = total;
    }
  }
}

template <class T, int N, int COUNT, int THREADS>
__global__ void __launch_bounds__(THREADS, blocks_of(COUNT* N)) layer_norm_bwd_kernel(const BackwardArguments<T> a) {
  constexpr bool in_registers = THREADS == sum_threads;
  constexpr bool ahead = in_registers && COUNT * N * sizeof(T) <= 64;
  __shared__ float scratch[2][2][most_warps];
  const Row<T, N, COUNT> columns(a.columns);
  ColumnSums<N, COUNT, in_registers> sums;
  sums.memory = a.blocks.partial + int64_t(blockIdx.x) * a.blocks.width;
  sums.columns = a.columns;
  if constexpr (!in_registers) {
    for (int c = threadIdx.x; c < a.blocks.width; c += blockDim.x) sums.memory[c] = 0;
    __syncthreads();
  }
  const Dropout dropout(a.dropout);
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  int turn = 0;
  Part<T, N, COUNT> part;
  if (ahead) part.load(a, columns, row);
  for (; row < a.rows; row += step) {
    Part<T, N, COUNT> next;
    ahead ? next.load(a, columns, row + step) : part.load(a, columns, row);
    float means[2] = {};  // of g and of g * xhat
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      float dy[N], g[N], xhat[N];
      part.normalized(a.weight, columns.column(i), columns.inside(i), i, dy, g, xhat);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        means[0] += g[j];
        means[1] += g[j] * xhat[j];
      }
    }
    row_sums(means, scratch[turn]);
    turn ^= 1;
    const float g_mean = a.rms ? 0.0f : means[0] * a.inverse_columns;
    write_row(a, columns, part, row, g_mean, means[1] * a.inverse_columns, dropout, sums);
    if (ahead) part = next;
  }
  if constexpr (in_registers) sum_over_rows(columns, sums, a.column_sums);
  sum_over_blocks(a.blocks, blockIdx.x, [&](int c, float sum) {
    float* out = a.column_sums[c / a.columns];
    if (out != nullptr) out[c % a.columns] = sum;
  });
}

template <class T, int N, int ELEMENTS, int THREADS = sum_threads>
constexpr auto kernel_of = layer_norm_bwd_kernel<T, N, ELEMENTS / N, THREADS>;

template <class T, int N>
auto kernel_for(int elements, bool long_rows) {
  if constexpr (N > 1) {
    if (long_rows) return kernel_of<T, N, 32, most_threads>;
    return elements == 32   ? kernel_of<T, N, 32>
           : elements == 24 ? kernel_of<T, N, 24>
           : elements == 16 ? kernel_of<T, N, 16>
                            : kernel_of<T, N, 8>;
  } else {
    return long_rows ? kernel_of<T, 1, 16, most_threads> : elements == 16 ? kernel_of<T, 1, 16> : kernel_of<T, 1, 8>;
  }
}

template <class T, int N>
void backward(const LayerNormBackward& p, const Launch& launch) {
  const int64_t rows = p.sum.shape[0], columns = p.sum.shape[1];
  constexpr int most = N > 1 ? 32 : 16;
  if (columns > most_threads * most) fail("layer_norm: at most ", most_threads * most, " columns, got ", columns);
  const bool long_rows = columns > sum_threads * most;
  const int elements = long_rows ? most
                       : N > 1   ? fullest(columns, sum_threads, true, {32, 24, 16, 8})
                                 : fullest(columns, sum_threads, true, {16, 8});
  const unsigned threads = unsigned(ceil_div(columns, warp_size * elements)) * warp_size;
  const unsigned together = long_rows ? 1 : sum_threads / threads;
  const int blocks =
      int(std::min<int64_t>(ceil_div(rows, together), multiprocessors() * std::max(blocks_of(elements), 1)));
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
                               1.0f / float(columns),
                               dropout(p.dropout_p, launch),
                               p.rms};
  const size_t shared_bytes = long_rows ? 0 : size_t(together * columns) * sizeof(float);
  const Shape shape{dim3(unsigned(blocks)), dim3(threads, together), shared_bytes};
  start("layer_norm_bwd", p.sum, kernel_for<T, N>(elements, long_rows), shape, launch, a);
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
