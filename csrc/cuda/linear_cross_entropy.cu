// The losses of rows whose logits stand in memory, and the gradient of the logits in their place.
//
//     x = softcap * tanh(logits / softcap), or logits
//     loss = (1 - e) * (lse - x[target]) + e * (lse - mean(x)) + z * lse^2
//     dloss/dx = (1 + 2 z lse) * exp(x - largest) / sum - (1 - e) [v = target] - e / V
//
// The logits come from torch's product, a chunk of rows at a time. A block has a row: it reads it once for the largest
// value and the sum of exponentials (online: each thread rescales its sum when it meets a larger value) and, where the
// gradient is wanted, once more to replace it. The second reading finds the row in the L2 cache: a row is 100 KB at a
// vocabulary of 50k in 16 bits, and every multiprocessor has one under way. So a logit costs 6 bytes here, and 10 with
// the product before and the one behind.
//
// p - 1 cancels for a target that is nearly certain: p is exp(x - largest) / sum of the row at hand and not from a
// rounded lse. The vocabulary may be odd, but rows start at 16 bytes: the last few elements of a row are taken one by
// one.
#include "linear_cross_entropy.h"

#include "numeric.cuh"
#include "reduce.cuh"

namespace pytransformer::cuda {
namespace {

constexpr int row_threads = 512;

template <class T>
struct Arguments {
  T* logits;
  const int64_t* target;
  float *loss, *lse;
  const float* row_scale;  // null: no gradient
  int row_scale_stride;    // 0: one for all rows
  int64_t row_stride;
  int classes;
  CrossEntropyOptions options;
};

// body(first class, values) for all classes of a row, each by one thread: 16 bytes at a time, single ones at the end.
template <int loads_together, class T, class Body>
__device__ void for_row(T* row, int classes, const Body& body) {
  constexpr int wide = widest<T>;
  const int end = classes / wide * wide;
  float one[1], several[wide];
#pragma unroll loads_together
  for (int v = threadIdx.x * wide; v < end; v += row_threads * wide) {
    load(row + v, several);
    body(v, several);
  }
  if (threadIdx.x < classes - end) {
    const int v = end + threadIdx.x;
    load(row + v, one);
    body(v, one);
  }
}

// softcap * tanh(x / softcap), or x where there is none.
template <bool exists>
struct SoftCap {
  float cap, inverse;

  explicit __device__ SoftCap(float cap) : cap(cap), inverse(1.0f / cap) {}

  // tanh(x / softcap), 0 where there is none.
  __device__ float tanh(float x) const { return exists ? tanhf(x * inverse) : 0.0f; }
  __device__ float operator()(float x, float tanh_of_x) const { return exists ? cap * tanh_of_x : x; }
  __device__ float operator()(float x) const { return (*this)(x, tanh(x)); }
};

// The sum of exp(x - largest) over what was seen so far, and the plain sum.
struct Seen {
  float largest = -INFINITY, exponentials = 0, total = 0;

  template <int N>
  __device__ void add(const float (&x)[N]) {
    float larger = largest;
#pragma unroll
    for (int j = 0; j < N; ++j) larger = fmaxf(larger, x[j]);
    const float pivot = larger == -INFINITY ? 0.0f : larger;
    exponentials *= expf(largest - pivot);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      exponentials += expf(x[j] - pivot);
      total += x[j];
    }
    largest = larger;
  }
};

// Of all threads of the block; largest is 0 where every value is -inf.
__device__ Seen combined(Seen seen) {
  __shared__ float maxima[most_warps], scratch[2][most_warps];
  float largest = seen.largest;
#pragma unroll
  for (int step = warp_size / 2; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(whole_warp, largest, step));
  }
  if (threadIdx.x % warp_size == 0) maxima[threadIdx.x / warp_size] = largest;
  __syncthreads();
  for (int i = 0; i < row_threads / warp_size; ++i) largest = fmaxf(largest, maxima[i]);
  if (largest == -INFINITY) largest = 0;
  float sums[2] = {seen.exponentials * expf(seen.largest - largest), seen.total};
  row_sums(sums, scratch);
  seen.largest = largest;
  seen.exponentials = sums[0];
  seen.total = sums[1];
  return seen;
}

// Whether there is a soft cap is asked once a row, not of every logit.
template <class T, bool soft>
__device__ void row_losses(const Arguments<T>& a, int64_t n, int64_t target, T* row) {
  const CrossEntropyOptions& o = a.options;
  const SoftCap<soft> cap(o.softcap);
  constexpr int loads_together = soft ? 1 : 2;  // a soft cap is arithmetic enough, and takes registers
  // A target outside the classes is not followed: its loss is NaN.
  const int known = target >= 0 && target < a.classes ? int(target) : -1;
  const float at_target = known >= 0 ? cap(to_float(row[known])) : nanf("");
  Seen seen;
  for_row<loads_together>(row, a.classes, [&](int, auto& x) {
#pragma unroll
    for (float& value : x) value = cap(value);
    seen.add(x);
  });
  seen = combined(seen);  // behind its barriers the logits may be replaced: at_target has been read
  const float lse = seen.largest + logf(seen.exponentials), classes = float(a.classes);
  if (threadIdx.x == 0) {
    float loss = (1.0f - o.label_smoothing) * (lse - at_target) + o.z_loss * lse * lse;
    if (o.label_smoothing > 0) loss += o.label_smoothing * (lse - seen.total / classes);
    a.loss[n] = loss;
    a.lse[n] = lse;
  }
  if (a.row_scale == nullptr) return;
  const float scale = a.row_scale[n * a.row_scale_stride], normaliser = 1.0f / seen.exponentials;
  const float towards_zero = 2.0f * o.z_loss * lse, each = o.label_smoothing / classes;
  for_row<loads_together>(row, a.classes, [&](int first, auto& x) {
    int from_target = first - known;
#pragma unroll
    for (float& value : x) {
      const float th = cap.tanh(value);
      const float p = expf(cap(value, th) - seen.largest) * normaliser;
      float gradient = p - each;  // first what may cancel
      if (from_target++ == 0) gradient -= 1.0f - o.label_smoothing;
      gradient += towards_zero * p;
      value = gradient * (1.0f - th * th) * scale;
    }
    store(row + first, x);
  });
}

template <class T>
__global__ void __launch_bounds__(row_threads, 2) cross_entropy_rows_kernel(const Arguments<T> a) {
  const int64_t n = blockIdx.x, target = a.target[n];
  T* row = a.logits + n * a.row_stride;
  if (target != a.options.ignore_index) {
    return a.options.softcap > 0 ? row_losses<T, true>(a, n, target, row) : row_losses<T, false>(a, n, target, row);
  }
  if (a.row_scale != nullptr) {
    for (int v = threadIdx.x; v < a.classes; v += row_threads) row[v] = from_float<T>(0.0f);
  }
  if (threadIdx.x == 0) a.loss[n] = a.lse[n] = 0.0f;
}

}  // namespace

void cross_entropy_rows(const CrossEntropyRows& p, const Launch& launch) {
  by_dtype<float, __half, __nv_bfloat16>("linear_cross_entropy", p.logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (!aligned(p.logits, 16) || p.logits.stride[0] % widest<T> != 0) {
      fail("linear_cross_entropy: rows of logits must start at multiples of 16 bytes");
    }
    const Arguments<T> a{p.logits.ptr<T>(),  p.target.ptr<const int64_t>(),  p.loss.ptr<float>(),
                         p.lse.ptr<float>(), p.row_scale.ptr<const float>(), p.row_scale.numel() == 1 ? 0 : 1,
                         p.logits.stride[0], int(p.logits.shape[1]),         p.options};
    start("cross_entropy_rows", p.logits, cross_entropy_rows_kernel<T>,
          {dim3(unsigned(p.logits.shape[0])), dim3(row_threads)}, launch, a);
  });
}

}  // namespace pytransformer::cuda
