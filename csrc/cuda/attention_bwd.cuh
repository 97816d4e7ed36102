// Attention, backward: the weights are made again, tile by tile, from the scores and the lse.
//
//     P = exp(scores - lse);  dV = P^T dOut;  dP = dOut V^T;  dS = P * (dP - delta);  dQ = dS K;  dK = dS^T Q
//
// with delta = sum(dOut * out) of each row. Three kernels: one makes delta; one owns blocks of queries and walks over
// the keys for dQ, and for the gradient of a bias, which is dS; one owns blocks of keys and walks over the queries of
// all heads that share them, for dK and dV. That is seven products where one kernel would do with five, and no atomics:
// everything is added up by one owner in one order, the same bits in every run.
//
// The second and the third kernel differ in which way round they hold a tile of scores, because what the last product
// takes from registers is its left operand: dS for dQ, P^T and dS^T for dV and dK. What happens to a score in between
// is written here once, and a `Place` tells where it stands:
//
//     place.query(m, i), place.key(...)     its position
//     place.lse(m, n, i), place.delta(...)  of its query; the lse in units of log2
//
// As in the forward, an operand that a weight of 0 multiplies may be NaN. The blocks look at their sums, and where
// these hold a NaN start over with the operand of the last product (keys, or queries) cleaned in partial tiles.
//
// Source: Dao et al., "FlashAttention", 2022, algorithm 4; Dao, "FlashAttention-2", 2023, section 3.1.
#pragma once

#include "attention_scores.cuh"

namespace pytransformer::cuda {

struct BackwardArguments : AttentionArguments {
  Heads out, grad_out;
  const float* lse;
  float *lse_in_log2, *delta;   // of each query; the first 0 where the lse is -inf
  int64_t lse_batch, lse_head;  // strides of all three, [B,H,T]
  Heads grad_query, grad_key, grad_value;
  float* grad_bias;  // [B,H,T,S], zeros where no tile is visited; or null

  // Where a head of a sequence begins in the lse, and in what is made of it.
  __device__ int64_t of_rows(int batch, int head) const {
    return batch * lse_batch + head * lse_head + before_queries(batch);
  }
};

// The keys [first, end) of a head that block `index` has, which the query heads from `head` on share.
struct KeyRows {
  int batch, key_head, head, first, end;

  KeyRows() = default;
  __device__ KeyRows(const AttentionArguments& a, int keys, int index) {
    const int blocks = (a.S + keys - 1) / keys, key_heads = a.H / a.group;
    const Turn turn(index, blocks, a.B * key_heads, a.key_rows_together);
    first = turn.block * keys;
    batch = turn.row / key_heads;
    key_head = turn.row % key_heads;
    head = key_head * a.group;
    end = a.keys_in(batch);
  }
};

// Starts the kernels that own queries and keys.
template <class T>
void attention_bwd_query(const BackwardArguments& a, const TensorView& query, const Launch& launch);
template <class T>
void attention_bwd_key(const BackwardArguments& a, const TensorView& key, const Launch& launch);

// By Hopper's own instructions: dQ for head dims from 33 to 256, dK and dV to 128 and from 129.
template <class T>
void attention_bwd_query_sm90(const BackwardArguments& a, const TensorView& query, const Launch& launch);
template <class T>
void attention_bwd_key_sm90(const BackwardArguments& a, const TensorView& key, const Launch& launch);
template <class T>
void attention_bwd_wide_key_sm90(const BackwardArguments& a, const TensorView& key, const Launch& launch);

// Scale, soft cap and bias of a tile of products; what is hidden later may be NaN.
template <class T, int M, int N, class Place>
__device__ inline void shape_scores(float (&x)[M][N / 8][4], const AttentionArguments& a, const Place& place,
                                    int64_t bias_offset) {
  each_element<M, N>([&](int m, int n, int i) {
    const int t = place.query(m, n, i), s = place.key(m, n, i);
    const bool inside = a.bias.data != nullptr && t < a.T && s < a.S;
    const float bias = inside ? bias_at<T>(a.bias, bias_offset + t * a.bias.query + s * a.bias.key) : 0.0f;
    x[m][n][i] = shaped_score(x[m][n][i], bias, a);
  });
}

// Which scores of a tile are visible, and which dropout keeps. Made before the products: later registers are scarce.
template <int M>
struct TileBits {
  uint32_t visible[M], kept[M];

  TileBits() = default;
  template <class Place>
  __device__ TileBits(const Place& place, const Asked& asked) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      visible[m] = asked.hides ? place.visible(m) : 0xffffffffu;
      kept[m] = asked.drops ? place.kept(m) : 0xffffffffu;
    }
  }
};

// Multiplies by `scale` where the bit is set; elsewhere 0, whatever was there.
template <int M, int N>
__device__ inline void keep(float (&x)[M][N / 8][4], const uint32_t (&bits)[M], float scale) {
  each_element<M, N>([&](int m, int n, int i) { x[m][n][i] = bits[m] >> (4 * n + i) & 1 ? x[m][n][i] * scale : 0.0f; });
}

// From products to weights, before dropout.
template <class T, int M, int N, class Place>
__device__ inline void score_weights(float (&x)[M][N / 8][4], const AttentionArguments& a, const Place& place,
                                     const TileBits<M>& bits, const Asked& asked, int64_t bias_offset) {
  if (asked.shapes) shape_scores<T, M, N>(x, a, place, bias_offset);
  const float factor = score_factor(a, asked);
  each_element<M, N>(
      [&](int m, int n, int i) { x[m][n][i] = ptx::exp2(fmaf(x[m][n][i], factor, -place.lse(m, n, i))); });
  if (asked.hides) keep<M, N>(x, bits.visible, 1);
}

// From dP to dS, by the weights before dropout.
template <int M, int N, class Place>
__device__ inline void score_gradients(float (&x)[M][N / 8][4], const float (&weights)[M][N / 8][4],
                                       const DropoutArgument& dropout, const Place& place, const TileBits<M>& bits,
                                       const Asked& asked) {
  if (asked.drops) keep<M, N>(x, bits.kept, dropout.scale);
  each_element<M, N>([&](int m, int n, int i) { x[m][n][i] = weights[m][n][i] * (x[m][n][i] - place.delta(m, n, i)); });
  if (asked.hides) keep<M, N>(x, bits.visible, 1);
}

// From dS to the gradient of the products, where scores are capped. The products are made again by the caller, once P
// has been used: kept beside it they would cost registers that calls without a cap have no use for. The slope of a
// score that nobody sees may be NaN, and its dS is 0.
template <int M, int N>
__device__ inline void cap_gradients(float (&ds)[M][N / 8][4], const float (&products)[M][N / 8][4],
                                     const AttentionArguments& a) {
  each_element<M, N>([&](int m, int n, int i) {
    ds[m][n][i] = ds[m][n][i] == 0 ? 0.0f : ds[m][n][i] * softcap_slope(products[m][n][i], a);
  });
}

// The place of a tile whose rows are queries, and columns keys.
template <int M, int N>
struct RowsAreQueries {
  const Visibility& v;
  const BackwardArguments& a;
  const float2 (&of_rows)[M][2];  // lse and delta
  int64_t line;                   // first row of the head in [B*H*T]
  int row, s;                     // this lane's first query; the tile's first key

  __device__ int query(int m, int, int i) const { return row + 16 * m + i / 2 * 8; }
  __device__ int key(int, int n, int i) const { return s + 8 * n + lane_column() + i % 2; }
  __device__ float lse(int m, int, int i) const { return of_rows[m][i / 2].x; }
  __device__ float delta(int m, int, int i) const { return of_rows[m][i / 2].y; }
  __device__ uint32_t visible(int m) const { return visible_keys<N>(v, row + 16 * m, row + 16 * m + 8, s); }
  __device__ uint32_t kept(int m) const { return keep_keys<N>(Dropout(a.dropout), line + row + 16 * m, s, v.S); }
};

template <int M, int N>
__device__ inline void store_grad_bias(const float (&ds)[M][N / 8][4], const RowsAreQueries<M, N>& place, float* to) {
  each_element<M, N>([&](int m, int n, int i) {
    const int t = place.query(m, n, i), s = place.key(m, n, i);
    if (t < place.a.T && s < place.a.S) to[int64_t(t) * place.a.S + s] = ds[m][n][i];
  });
}

// The place of a tile whose rows are keys, and columns queries.
template <int M, int N>
struct RowsAreKeys {
  const Visibility& v;
  const BackwardArguments& a;
  const float2 (&of_columns)[N / 8];  // the lse for the weights, then delta for their gradients
  int64_t line;                       // first row of the head in [B*H*T]
  int row, t, member;                 // the warp's first key; the tile's first query

  __device__ int query(int, int n, int i) const { return t + 8 * n + lane_column() + i % 2; }
  __device__ int key(int m, int, int i) const { return row + 16 * m + lane_row() + i / 2 * 8; }
  __device__ float lse(int, int n, int i) const { return i % 2 == 0 ? of_columns[n].x : of_columns[n].y; }
  __device__ float delta(int m, int n, int i) const { return lse(m, n, i); }
  __device__ uint32_t visible(int m) const { return visible_queries<N>(v, t, row + 16 * m + lane_row(), member); }
  __device__ uint32_t kept(int m) const { return keep_queries<N>(Dropout(a.dropout), line + t, row + 16 * m, v.S); }
};

// The weights of a tile of 16 M keys and N queries on their way from one warp to another, and the bits that go with
// them where some are hidden or dropped.
template <int M, int N>
struct Exchange {
  static constexpr int bytes = (M * N / 8 + 1) * 32 * 16;

  uint32_t base;  // of this lane; steps of 512 bytes

  __device__ void put(const float (&x)[M][N / 8][4]) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        const float (&group)[4] = x[m][n];
        const uint4 words{__float_as_uint(group[0]), __float_as_uint(group[1]), __float_as_uint(group[2]),
                          __float_as_uint(group[3])};
        ptx::store_shared_16(base + 512 * (m * N / 8 + n), words);
      }
    }
  }

  __device__ void take(float (&x)[M][N / 8][4]) const {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        const uint4 words = ptx::load_shared_16(base + 512 * (m * N / 8 + n));
        float (&group)[4] = x[m][n];
        group[0] = __uint_as_float(words.x);
        group[1] = __uint_as_float(words.y);
        group[2] = __uint_as_float(words.z);
        group[3] = __uint_as_float(words.w);
      }
    }
  }

  __device__ void put(const TileBits<M>& bits) const {
    const uint4 words{bits.visible[0], bits.kept[0], bits.visible[M - 1], bits.kept[M - 1]};
    ptx::store_shared_16(base + 512 * M * N / 8, words);
  }

  __device__ void take(TileBits<M>& bits) const {
    static_assert(M <= 2);
    const uint4 words = ptx::load_shared_16(base + 512 * M * N / 8);
    bits.visible[0] = words.x;
    bits.kept[0] = words.y;
    bits.visible[M - 1] = words.z;
    bits.kept[M - 1] = words.w;
  }
};

}  // namespace pytransformer::cuda
