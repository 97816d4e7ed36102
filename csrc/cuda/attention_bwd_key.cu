// dK and dV: a block owns 16 M keys for each warp and walks over the queries of all heads that share them, head after
// head (attention_bwd.cuh). Tiles of scores are transposed.
//
// The sums of dK and dV take 2 D / 2 registers of each thread for M = 1. Beyond D = 128 they do not fit together, so
// that there a block makes one of them, and the scores are computed twice.
#include <algorithm>

#include "attention_bwd.cuh"

namespace pytransformer::cuda {
namespace {

template <int D>
struct KeyCut {
  static constexpr bool apart = D > 128;  // dK and dV by different blocks
  static constexpr int M = D <= 32 ? 2 : 1;
  static constexpr int keys = 16 * M * warps;
  static constexpr int queries = D < 128 ? 32 : 16;
  static constexpr int stages = 2;
  static constexpr int statistics_bytes = stages * queries * int(sizeof(float2));
  static constexpr int shared_bytes = tile_bytes<D>(2 * keys + 2 * stages * queries) + statistics_bytes;
};

// Rows of a tile of scores are keys, columns queries.
template <int M, int N>
struct RowsAreKeys {
  const Visibility& v;
  const BackwardArguments& a;
  uint32_t of_columns;  // float2 [N] in shared memory
  int64_t line;         // first row of the head in [B*H*T]
  int row, t, member;   // the warp's first key; the tile's first query

  __device__ int query(int, int n, int i) const { return t + 8 * n + lane_column() + i % 2; }
  __device__ int key(int m, int, int i) const { return row + 16 * m + lane_row() + i / 2 * 8; }
  __device__ float2 statistics(int, int n, int i) const {
    return ptx::load_shared_8(of_columns + 8 * (8 * n + lane_column() + i % 2));
  }
  __device__ uint32_t visible(int m) const { return visible_queries<N>(v, t, row + 16 * m + lane_row(), member); }
  __device__ uint32_t kept(int m) const { return keep_queries<N>(Dropout(a.dropout), line + t, row + 16 * m, v.S); }
};

// A tile of queries of one of the heads.
struct Step {
  int member, tile;
};

template <class T, int D>
__global__ void __launch_bounds__(threads, 2) attention_bwd_key_kernel(const __grid_constant__ BackwardArguments a) {
  using Cut = KeyCut<D>;
  constexpr int M = Cut::M, N = Cut::queries;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t memory = ptx::shared_address(shared);
  const auto tile_at = [&](int row) { return Tile<D>{memory + tile_bytes<D>(row)}; };
  const Tile<D> keys = tile_at(0), values = tile_at(Cut::keys);
  const auto buffer = [&](int i) { return tile_at(2 * Cut::keys + i * N); };
  const auto statistics = [&](int stage) {
    return memory + tile_bytes<D>(2 * Cut::keys + 2 * Cut::stages * N) + stage * N * int(sizeof(float2));
  };

  const int blocks = (a.S + Cut::keys - 1) / Cut::keys, index = int(blockIdx.x) / (Cut::apart ? 2 : 1);
  const bool makes_key = !Cut::apart || blockIdx.x % 2 == 0, makes_value = !Cut::apart || blockIdx.x % 2 == 1;
  const int s = index % blocks * Cut::keys, key_heads = a.H / a.group;
  const int batch = index / blocks / key_heads, key_head = index / blocks % key_heads, head = key_head * a.group;
  const Visibility v(a, batch, head);
  if (a.cu_seq_k != nullptr && s >= v.length) return;  // of a sequence that is shorter than the longest
  const Range range = query_tiles<N, Cut::keys>(v, s);
  TileKind kind = TileKind::empty;  // of the step found last
  const auto find = [&](Step step) {
    for (; step.member < a.group; step = {step.member + 1, range.tile}) {
      for (; step.tile < range.end; ++step.tile) {
        kind = v.kind<N, Cut::keys>(step.tile * N, s, step.member);
        if (kind != TileKind::empty) return step;
      }
    }
    return step;
  };
  const auto load = [&](Step step, int stage) {
    const int h = head + step.member, before = a.before_queries(batch);
    const int t = before + step.tile * N, end = before + v.T;
    load_rows<N>(buffer(2 * stage), a.query, batch * a.query.batch + h * a.query.head, t, end);
    load_rows<N>(buffer(2 * stage + 1), a.grad_out, batch * a.grad_out.batch + h * a.grad_out.head, t, end);
    const int i = threadIdx.x;
    const float2* of_head = a.statistics + batch * a.lse_batch + h * a.lse_head;
    const bool inside = t + i < end;
    if (i < N) ptx::copy_8_async(statistics(stage) + 8 * i, of_head + (inside ? t + i : 0), inside);
  };
  load_rows<Cut::keys>(keys, a.key, a.of_keys(a.key, batch, key_head), s, v.length);
  load_rows<Cut::keys>(values, a.value, a.of_keys(a.value, batch, key_head), s, v.length);

  const int of_warp = 16 * M * warp();
  float sums[Cut::apart ? 1 : 2][M][D / 8][4];
  auto &grad_key = sums[0], &grad_value = sums[Cut::apart ? 0 : 1];
#pragma unroll 1
  for (bool careful = false;; careful = true) {
    set_zero<M, D>(grad_key);
    if (!Cut::apart) set_zero<M, D>(grad_value);
    Step step = find({0, range.tile});
    if (step.member < a.group) load(step, 0);
    ptx::commit_copies();
    for (int stage = 0; step.member < a.group; stage ^= 1) {
      const bool partial = kind == TileKind::partial;
      const Step next = find({step.member, step.tile + 1});
      ptx::wait_for_copies<0>();
      __syncthreads();  // this tile is here, and nobody reads the other buffer any more
      if (next.member < a.group) load(next, stage ^ 1);
      ptx::commit_copies();
      const Tile<D> queries = buffer(2 * stage), grad_outs = buffer(2 * stage + 1);
      if (careful && partial) {
        clean_tile<T, N>(queries, nullptr);
        __syncthreads();
      }
      const int h = head + step.member;
      const RowsAreKeys<M, N> place{
          v, a, statistics(stage), (int64_t(batch) * a.H + h) * a.T, s + of_warp, step.tile * N, step.member};
      const TileBits<M> bits(place, partial, a.dropout);
      float p[M][N / 8][4] = {}, ds[M][N / 8][4] = {};
      multiply_rows<T, M, N>(p, keys, of_warp, queries);
      if (makes_key) multiply_rows<T, M, N>(ds, values, of_warp, grad_outs);
      score_gradients<T, M, N>(p, ds, a, place, bits, partial, batch * a.bias.batch + h * a.bias.head, nullptr);
      if (makes_value) multiply_weights<T, M, N>(grad_value, p, grad_outs);
      if (a.softcap > 0) {
        float products[M][N / 8][4] = {};
        multiply_rows<T, M, N>(products, keys, of_warp, queries);
        cap_gradients<M, N>(ds, products, a);
      }
      if (makes_key) multiply_weights<T, M, N>(grad_key, ds, queries);
      step = next;
    }
    ptx::wait_for_copies<0>();  // of the operands that stay, where no tile was visited
    if (!__syncthreads_or(has_nan<M, D>(grad_key)) || careful) break;
  }
  const int first = s + of_warp, end = a.keys_in(batch);
  if (makes_value) {
    store_rows<T, M>(grad_value, values, of_warp, a.grad_value, a.of_keys(a.grad_value, batch, key_head), first, end);
  }
  if (makes_key) {
    multiply_all<M, D>(grad_key, a.scale);
    store_rows<T, M>(grad_key, keys, of_warp, a.grad_key, a.of_keys(a.grad_key, batch, key_head), first, end);
  }
}

}  // namespace

template <class T>
void attention_bwd_key(const BackwardArguments& a, const TensorView& key, const Launch& launch) {
  by_head_width("attention_bwd", std::max(a.query.width, a.value.width), [&](auto width) {
    using Cut = KeyCut<width()>;
    const int64_t blocks = ceil_div(a.S, Cut::keys) * a.B * (a.H / a.group) * (Cut::apart ? 2 : 1);
    start("attention_bwd: key", key, attention_bwd_key_kernel<T, width()>,
          Shape{dim3(unsigned(blocks)), dim3(threads), size_t(Cut::shared_bytes)}, launch, a);
  });
}

template void attention_bwd_key<__half>(const BackwardArguments&, const TensorView&, const Launch&);
template void attention_bwd_key<__nv_bfloat16>(const BackwardArguments&, const TensorView&, const Launch&);

}  // namespace pytransformer::cuda
