// The elementwise middle of the feed-forward network; the products on either side of it are cuBLAS's, called by torch.
//
//     a = dropout(act(h) * g)                          h = x W1^T + b1, g = x Wg^T + bg or 1, from the products
//     backward: da -> a again (for dW2), dh, dg, and the column sums of dh and dg, which are the biases' gradients
//
// Forward moves 4 bytes an element in 16 bits (6 with a gate), backward 8 (12): a is not kept for it but made again
// from h, whose load it needs anyway. Both are bound by memory, so they move 16 bytes a thread at a time and keep
// enough threads for the latency.
//
// Forward does not see rows: it takes the matrix as one long vector, whose last few elements are taken one by one.
// Backward gives a thread a few columns and lets it walk down a share of the rows, its column sums in registers; the
// shares' sums are added up in a fixed order by the block that is last in its strip of columns.
#include "ffn.h"

#include "activation.cuh"
#include "numeric.cuh"
#include "philox.cuh"
#include "reduce.cuh"

namespace pytransformer::cuda {
namespace {

constexpr int flat_threads = 256;
constexpr int rows_together = 8;  // of a block of the backward, a warp each

template <class T>
struct ForwardArguments {
  const T *hidden, *gate;
  T* activated;
  int64_t count;
  Activation activation;
  DropoutArgument dropout;
};

template <class T, int N>
__device__ void activate_at(const ForwardArguments<T>& a, const Dropout& dropout, int64_t place) {
  float x[N], gate[N];
  load(a.hidden + place, x);
  if (a.gate != nullptr) load(a.gate + place, gate);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    x[j] = activate(a.activation, x[j]).value;
    if (a.gate != nullptr) x[j] *= gate[j];
  }
  dropout.apply(place, x);
  store(a.activated + place, x);
}

template <class T, int N>
__global__ void __launch_bounds__(flat_threads) ffn_activation_fwd_kernel(const ForwardArguments<T> a) {
  const int64_t place = (int64_t(blockIdx.x) * flat_threads + threadIdx.x) * N;
  const Dropout dropout(a.dropout);
  if (place + N <= a.count) return activate_at<T, N>(a, dropout, place);
  for (int64_t i = place; i < a.count; ++i) activate_at<T, 1>(a, dropout, i);
}

template <class T>
struct BackwardArguments {
  const T *grad_activated, *hidden, *gate;
  T *activated, *grad_hidden, *grad_gate;
  float *grad_bias, *grad_bias_gate;
  float* partial;  // [strips][gridDim.y][2][columns of a strip]
  int* counters;   // [strips][1 + groups]
  int64_t rows;
  int columns;
  Activation activation;
  DropoutArgument dropout;
};

// The gradients at N neighbours; adds what was stored to the column sums.
template <class T, int N>
__device__ void differentiate_at(const BackwardArguments<T>& a, const Dropout& dropout, int64_t place,
                                 float (&sums)[2][N]) {
  float da[N], h[N], gate[N], keep[N];
  load(a.grad_activated + place, da);
  load(a.hidden + place, h);
  if (a.gate != nullptr) load(a.gate + place, gate);
#pragma unroll
  for (int j = 0; j < N; ++j) keep[j] = 1.0f;
  dropout.apply(place, keep);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const Activated y = activate(a.activation, h[j]);
    da[j] = keep[j] == 0 ? 0.0f : da[j] * keep[j];
    const float through = a.gate != nullptr ? gate[j] : 1.0f;
    gate[j] = da[j] * y.value;
    h[j] = da[j] * y.slope * through;
    keep[j] = keep[j] == 0 ? 0.0f : y.value * through * keep[j];
  }
  store(a.activated + place, keep);
  store(a.grad_hidden + place, h);
  if (a.gate != nullptr) store(a.grad_gate + place, gate);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    sums[0][j] += rounded<T>(h[j]);
    if (a.gate != nullptr) sums[1][j] += rounded<T>(gate[j]);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(warp_size* rows_together, 2) ffn_activation_bwd_kernel(const BackwardArguments<T> a) {
  constexpr int width = warp_size * N;  // of a strip
  __shared__ float rows[rows_together][2][width];
  const int first = blockIdx.x * width, column = first + threadIdx.x * N;
  const Dropout dropout(a.dropout);
  float sums[2][N] = {};
  if (column < a.columns) {
    const int64_t step = int64_t(gridDim.y) * rows_together;
    for (int64_t row = int64_t(blockIdx.y) * rows_together + threadIdx.y; row < a.rows; row += step) {
      differentiate_at(a, dropout, row * a.columns + column, sums);
    }
  }
  if (a.grad_bias == nullptr && a.grad_bias_gate == nullptr) return;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    rows[threadIdx.y][0][threadIdx.x * N + j] = sums[0][j];
    rows[threadIdx.y][1][threadIdx.x * N + j] = sums[1][j];
  }
  __syncthreads();
  BlockSums blocks;
  blocks.width = 2 * width;
  blocks.count = gridDim.y;
  blocks.group = BlockSums::group_of(blocks.count);
  blocks.partial = a.partial + int64_t(blockIdx.x) * blocks.count * blocks.width;
  blocks.counters = a.counters + blockIdx.x * (1 + BlockSums::groups(blocks.count));
  for (int c = threadIdx.y * warp_size + threadIdx.x; c < 2 * width; c += warp_size * rows_together) {
    float total = 0;
    for (int y = 0; y < rows_together; ++y) total += rows[y][c / width][c % width];
    blocks.partial[blockIdx.y * blocks.width + c] = total;
  }
  sum_over_blocks(blocks, blockIdx.y, [&](int c, float sum) {
    float* out = c < width ? a.grad_bias : a.grad_bias_gate;
    if (out != nullptr && first + c % width < a.columns) out[first + c % width] = sum;
  });
}

template <class T>
void forward(const FfnActivationForward& p, const Launch& launch) {
  const ForwardArguments<T> a{p.hidden.ptr<const T>(), p.gate.ptr<const T>(), p.activated.ptr<T>(),
                              p.hidden.numel(),        p.activation,          dropout(p.dropout_p, launch)};
  const bool wide = aligned(p.hidden, 16) && aligned(p.gate, 16) && aligned(p.activated, 16);
  const int64_t threads = ceil_div(a.count, wide ? widest<T> : 1);
  const Shape shape{dim3(unsigned(ceil_div(threads, flat_threads))), dim3(flat_threads)};
  start("ffn_activation_fwd", p.hidden,
        wide ? ffn_activation_fwd_kernel<T, widest<T>> : ffn_activation_fwd_kernel<T, 1>, shape, launch, a);
}

template <class T, int N>
void backward(const FfnActivationBackward& p, const Launch& launch) {
  const int64_t rows = p.hidden.shape[0], columns = p.hidden.shape[1];
  const int64_t strips = ceil_div(columns, warp_size * N);
  // As many shares of the rows as the caller brought memory for: [shares, 2, columns, rounded up to a strip].
  const int64_t shares = launch.workspace.shape[0];
  if (launch.workspace.ndim != 3) fail("ffn_activation_bwd: workspace must be [shares,2,columns]");
  check_workspace("ffn_activation_bwd", launch, shares * strips * 2 * warp_size * N * int64_t(sizeof(float)),
                  strips * (1 + BlockSums::groups(int(shares))));
  const BackwardArguments<T> a{p.grad_activated.ptr<const T>(),
                               p.hidden.ptr<const T>(),
                               p.gate.ptr<const T>(),
                               p.activated.ptr<T>(),
                               p.grad_hidden.ptr<T>(),
                               p.grad_gate.ptr<T>(),
                               p.grad_bias.ptr<float>(),
                               p.grad_bias_gate.ptr<float>(),
                               launch.workspace.ptr<float>(),
                               launch.counters.ptr<int>(),
                               rows,
                               int(columns),
                               p.activation,
                               dropout(p.dropout_p, launch)};
  const Shape shape{dim3(unsigned(strips), unsigned(shares)), dim3(warp_size, rows_together)};
  start("ffn_activation_bwd", p.hidden, ffn_activation_bwd_kernel<T, N>, shape, launch, a);
}

}  // namespace

void ffn_activation_fwd(const FfnActivationForward& p, const Launch& launch) {
  by_dtype<float, __half, __nv_bfloat16>("ffn", p.hidden.dtype, [&](auto zero) { forward<decltype(zero)>(p, launch); });
}

void ffn_activation_bwd(const FfnActivationBackward& p, const Launch& launch) {
  by_dtype<float, __half, __nv_bfloat16>("ffn", p.hidden.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool wide = p.hidden.shape[1] % widest<T> == 0 && aligned(p.grad_activated, 16) && aligned(p.hidden, 16) &&
                      aligned(p.gate, 16) && aligned(p.activated, 16) && aligned(p.grad_hidden, 16) &&
                      aligned(p.grad_gate, 16);
    wide ? backward<T, widest<T>>(p, launch) : backward<T, 1>(p, launch);
  });
}

}  // namespace pytransformer::cuda
