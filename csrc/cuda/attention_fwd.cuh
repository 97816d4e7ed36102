// What the forward kernels of attention share: their arguments, which rows a block has, and the softmax over scores in
// registers.
//
// A warp holds M fragments of 16 rows, as products leave them, on whatever tensor cores: element [m][n][i] of a lane is
// in column group n of 8, in the lane's upper row of the fragment for i < 2, else 8 rows below.
#pragma once

#include "attention_scores.cuh"

namespace pytransformer::cuda {

// Where keys and values lie in pages of a pool: key s in row s % size of page table[batch * stride + s / size].
struct Pages {
  const int32_t* table = nullptr;  // null where they lie in one piece
  int64_t stride = 0;
  int size = 1, shift = 0;
  uint32_t multiplier = 0;

  Pages() = default;
  Pages(const int32_t* table, int64_t stride, int size) : table(table), stride(stride), size(size), shift(31) {
    while (int64_t(1) << (shift - 31) < size) ++shift;
    multiplier = uint32_t(((uint64_t(1) << shift) + size - 1) / size);
  }

  // key / size by a multiplication (Granlund and Montgomery, 1994), exact for keys below 2^31.
  __device__ int index(int key) const { return int(uint64_t(uint32_t(key)) * multiplier >> shift); }
};

struct ForwardArguments : AttentionArguments {
  Heads out;   // not Grouped
  float* lse;  // [B,H,T] of these strides; Grouped: [splits,B,H,T]
  int64_t lse_batch, lse_head;
  float* parts;               // Grouped: [splits,B,H,T,Dv]
  int splits = 1, share = 0;  // Grouped: keys of a split, a multiple of the tile
  Pages pages;                // Grouped: Heads::batch of keys and values is the distance of pages
};

// The forward by Hopper's own instructions; head dims from 33 to 256.
void attention_fwd_sm90(const ForwardArguments& arguments, const AttentionForward& problem, const Launch& launch);

template <int M, int D>
struct RunningSoftmax {
  float total[M][D / 8][4];  // weighted values
  float largest[M][2];       // score, in units of log2
  float sum[M][2];           // of exponentials; of this lane's columns alone

  __device__ void reset() {
    set_zero<M, D>(total);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      largest[m][0] = largest[m][1] = -infinity;
      sum[m][0] = sum[m][1] = 0;
    }
  }

  // Of rows that see an unclean key: bit 2 m + half.
  __device__ void spoil(uint32_t rows) {
    each_element<M, D>([&](int m, int n, int i) {
      if (rows >> (2 * m + i / 2) & 1) total[m][n][i] = __builtin_nanf("");
    });
  }

  // Turns scores into weights relative to the largest so far.
  template <int N>
  __device__ void take_in(float (&x)[M][N / 8][4], float factor) {
    float rescale[M][2];
    if (raise_largest<N>(x, factor, rescale)) {
      multiply_total(rescale);
      multiply_sums(rescale);
    }
    add_weights<N>(x, factor);
  }

  // The three parts of it, for who must not touch `total` until later. Rows are looked at together: what one waits for,
  // the others hide. The first takes the largest scores up into `largest`, and tells what the sums so far are to be
  // multiplied by, and whether any of the warp's is.
  template <int N>
  __device__ bool raise_largest(const float (&x)[M][N / 8][4], float factor, float (&rescale)[M][2]) {
    bool same = true;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rescale[m][half] = raise<N>(x[m], factor, m, half);
        same = same && rescale[m][half] == 1;
      }
    }
    return __any_sync(all_lanes, !same);
  }

  __device__ void multiply_sums(const float (&rescale)[M][2]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      sum[m][0] *= rescale[m][0];
      sum[m][1] *= rescale[m][1];
    }
  }

  __device__ void multiply_total(const float (&rescale)[M][2]) {
    each_element<M, D>([&](int m, int n, int i) { total[m][n][i] *= rescale[m][i / 2]; });
  }

  template <int N>
  __device__ void add_weights(float (&x)[M][N / 8][4], float factor) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) exponentials<N>(x[m], factor, m, half);
    }
  }

  // Divides by the sums and returns the lse of one row; a row that has seen nothing is 0, its lse -inf.
  __device__ float finish(int m, int half, float keep_scale) {
    float all = sum[m][half];
    all += __shfl_xor_sync(all_lanes, all, 1);
    all += __shfl_xor_sync(all_lanes, all, 2);
    const bool unseen = all == 0;
    const float inverse = unseen ? 0.0f : keep_scale / all;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      total[m][n][2 * half] *= inverse;
      total[m][n][2 * half + 1] *= inverse;
    }
    return unseen ? -infinity : (largest[m][half] + log2f(all)) * ln_2;
  }

 private:
  // Takes the largest score of a row up into `largest`; returns what the sums so far are to be multiplied by.
  template <int N>
  __device__ float raise(const float (&x)[N / 8][4], float factor, int m, int half) {
    float top = -infinity;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) top = fmaxf(top, fmaxf(x[n][2 * half], x[n][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 1));
    top = fmaxf(top, __shfl_xor_sync(all_lanes, top, 2));
    const float before = largest[m][half];
    largest[m][half] = fmaxf(before, top * factor);
    return ptx::exp2(before - pivot(m, half));
  }

  // Of a row that has seen nothing 0: its weights are 0, not NaN.
  __device__ float pivot(int m, int half) const { return largest[m][half] == -infinity ? 0.0f : largest[m][half]; }

  template <int N>
  __device__ void exponentials(float (&x)[N / 8][4], float factor, int m, int half) {
    float added = 0;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        x[n][i] = ptx::exp2(fmaf(x[n][i], factor, -pivot(m, half)));
        added += x[n][i];
      }
    }
    sum[m][half] += added;
  }
};

// Scale, soft cap and bias. Done before anything is hidden: what is read here may be NaN.
template <class T, int M, int N, bool Grouped>
__device__ inline void shape_scores(float (&x)[M][N / 8][4], const ForwardArguments& a, const BlockRows<Grouped>& rows,
                                    int row, int s) {
  const int64_t offset = rows.batch * a.bias.batch + rows.head * a.bias.head;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * m + 8 * half;
      const int64_t of_row = offset + rows.member(r, a.T) * a.bias.head + rows.query(r, a.T) * a.bias.query;
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = s + 8 * n + lane_column() + i;
          const bool inside = a.bias.data != nullptr && r < rows.end && key < a.S;
          const float bias = inside ? bias_at<T>(a.bias, of_row + key * a.bias.key) : 0.0f;
          x[m][n][2 * half + i] = shaped_score(x[m][n][2 * half + i], bias, a);
        }
      }
    }
  }
}

// Hides what is not visible. `spoilt` is null, or has the unclean keys of the tile, a bit each: returns which rows see
// one of them, as bits 2 m + half.
template <int M, int N, bool Grouped>
__device__ inline uint32_t hide_scores(float (&x)[M][N / 8][4], const Visibility& v, const BlockRows<Grouped>& rows,
                                       int row, int s, const uint32_t* spoilt) {
  constexpr int width = N < 32 ? N : 32;
  uint32_t seeing = 0;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    int query[2], member[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + 16 * m + 8 * half;
      query[half] = r < rows.end ? rows.query(r, v.T) : v.T;
      member[half] = r < rows.end ? rows.member(r, v.T) : 0;
    }
#pragma unroll
    for (int first = 0; first < N; first += width) {
      if (spoilt != nullptr) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (v.word(query[half], s + first, member[half]) & spoilt[first / 32]) seeing |= 1u << (2 * m + half);
        }
      }
      const uint32_t visible = visible_keys<width>(v, query[0], query[1], s + first, member[0], member[1]);
#pragma unroll
      for (int n = 0; n < width / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = x[m][first / 8 + n][i];
          score = visible >> (4 * n + i) & 1 ? score : -infinity;
        }
      }
    }
  }
  return seeing;
}

// `row` is the index in [B*H*T] of the lane's first row.
template <int M, int N>
__device__ inline void drop_weights(float (&x)[M][N / 8][4], const Dropout& dropout, int64_t row, int s, int S) {
  constexpr int width = N < 64 ? N : 64;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int first = 0; first < N; first += width) {
      const uint32_t kept = keep_keys<width>(dropout, row + 16 * m, s + first, S);
#pragma unroll
      for (int n = 0; n < width / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& weight = x[m][first / 8 + n][i];
          weight = kept >> (4 * n + i) & 1 ? weight : 0.0f;
        }
      }
    }
  }
}

}  // namespace pytransformer::cuda
