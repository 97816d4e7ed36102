// How a row of layer_norm lies in the threads that share it, in the forward and in the backward.
#pragma once

#include <initializer_list>

#include "numeric.cuh"
#include "reduce.cuh"

namespace pytransformer::cuda {

// COUNT packs of N columns of a row in each thread, a warp's side by side.
template <class T, int N, int COUNT>
class Row {
 public:
  static constexpr int step = warp_size * N;

  __device__ explicit Row(int columns)
      : first_(int(threadIdx.x) / warp_size * COUNT * step + int(threadIdx.x) % warp_size * N) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) inside_[i] = column(i) < columns;
  }

  __device__ bool inside(int i) const { return inside_[i]; }
  __device__ int column(int i) const { return first_ + i * step; }

  __device__ void load(const T* row, Pack<T, N> (&x)[COUNT]) const {
    each([&](int i) { x[i] = load_pack<T, N>(row + column(i)); });
  }

  // f(i) for the packs that lie in the row.
  template <class F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (inside_[i]) f(i);
    }
  }

  // f(z, p) for each element and its parameter, if there is one; p is 0 beyond the row.
  template <class F>
  __device__ void with(const Parameter<T>& parameter, float (&z)[COUNT][N], const F& f) const {
    if (!parameter) return;
    parameter.visit([&](auto* data) {
      float p[COUNT][N] = {};
      each([&](int i) { load_neighbours(data + column(i), p[i]); });
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
#pragma unroll
        for (int j = 0; j < N; ++j) f(z[i][j], p[i][j]);
      }
    });
  }

 private:
  int first_;
  bool inside_[COUNT];
};

// Of these numbers of elements in a thread, the one with which a block's threads hold the fewest that are not of a row;
// of equals the first, which serves where the others would take more than `most` threads. A block has the threads of
// one row, or, where rows are packed, as many rows as `most` threads hold.
inline int fullest(int64_t columns, int most, bool packed, std::initializer_list<int> choices) {
  const auto held = [&](int elements) {
    const int64_t threads = ceil_div(columns, warp_size * elements) * warp_size;
    if (threads > most) return 1e9;
    return (packed ? double(most) / double(most / threads) : double(threads)) * elements;
  };
  int best = *choices.begin();
  for (const int elements : choices) {
    if (held(elements) < held(best)) best = elements;
  }
  return best;
}

}  // namespace pytransformer::cuda
