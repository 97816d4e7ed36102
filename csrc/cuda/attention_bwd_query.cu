// dQ, and the gradient of the bias: a block owns 16 M queries for each warp and walks over the keys
// (attention_bwd.cuh).
#include <algorithm>

#include "attention_bwd.cuh"

namespace pytransformer::cuda {
namespace {

template <int D>
struct QueryCut {
  static constexpr int M = D <= 64 ? 2 : 1;
  static constexpr int queries = 16 * M * warps;
  static constexpr int keys = D <= 128 ? 32 : 16;
  static constexpr int stages = 2;
  static constexpr int shared_bytes = tile_bytes<D>(2 * queries + 2 * stages * keys);
};

// Rows of a tile of scores are queries, columns keys.
template <int M, int N>
struct RowsAreQueries {
  const Visibility& v;
  const BackwardArguments& a;
  const float2 (&of_rows)[M][2];
  int64_t line;  // first row of the head in [B*H*T]
  int row, s;    // this lane's first query; the tile's first key

  __device__ int query(int m, int, int i) const { return row + 16 * m + i / 2 * 8; }
  __device__ int key(int, int n, int i) const { return s + 8 * n + lane_column() + i % 2; }
  __device__ float2 statistics(int m, int, int i) const { return of_rows[m][i / 2]; }
  __device__ uint32_t visible(int m) const { return visible_keys<N>(v, row + 16 * m, row + 16 * m + 8, s); }
  __device__ uint32_t kept(int m) const { return keep_keys<N>(Dropout(a.dropout), line + row + 16 * m, s, v.S); }
};

template <class T, int D>
__global__ void __launch_bounds__(threads, 2) attention_bwd_query_kernel(const __grid_constant__ BackwardArguments a) {
  using Cut = QueryCut<D>;
  constexpr int M = Cut::M, N = Cut::keys;
  extern __shared__ __align__(128) unsigned char shared[];
  const auto tile_at = [memory = ptx::shared_address(shared)](int row) { return Tile<D>{memory + tile_bytes<D>(row)}; };
  const Tile<D> queries = tile_at(0), grad_outs = tile_at(Cut::queries);
  const auto buffer = [&](int i) { return tile_at(2 * Cut::queries + i * N); };

  const int blocks = (a.T + Cut::queries - 1) / Cut::queries;
  const int t = (blocks - 1 - int(blockIdx.x) % blocks) * Cut::queries, line = int(blockIdx.x) / blocks;
  const int batch = line / a.H, head = line % a.H, key_head = head / a.group;
  const Visibility v(a, batch, head);
  if (t >= v.T) return;  // of a sequence that is shorter than the longest
  const Range range = key_tiles<Cut::queries, N>(v, t);
  TileKind kind = TileKind::empty;  // of the tile found last
  const auto find = [&](int tile) {
    while (tile < range.end && (kind = v.kind<Cut::queries, N>(t, tile * N)) == TileKind::empty) ++tile;
    return tile;
  };
  const int before = a.before_keys(batch);
  const auto load = [&](int tile, int stage) {
    const int s = before + tile * N, end = before + v.length;
    load_rows<N>(buffer(2 * stage), a.key, batch * a.key.batch + key_head * a.key.head, s, end);
    load_rows<N>(buffer(2 * stage + 1), a.value, batch * a.value.batch + key_head * a.value.head, s, end);
  };
  load_rows<Cut::queries>(queries, a.query, a.of_queries(a.query, batch, head), t, v.T);
  load_rows<Cut::queries>(grad_outs, a.grad_out, a.of_queries(a.grad_out, batch, head), t, v.T);

  const int of_warp = 16 * M * warp();
  const auto row_of = [&](int thread) { return t + thread / 32 * 16 * M + thread % 32 / 4; };  // the first, of a thread
  const float2* statistics = a.statistics + a.of_rows(batch, head);
  float2 of_rows[M][2];
#pragma unroll
  for (int i = 0; i < 2 * M; ++i) {
    const int row = row_of(threadIdx.x);
    of_rows[i / 2][i % 2] = row + 8 * i < v.T ? statistics[row + 8 * i] : float2{0, 0};
  }

  float sum[M][D / 8][4];
#pragma unroll 1
  for (bool careful = false;; careful = true) {
    set_zero<M, D>(sum);
    int tile = find(range.tile);
    if (tile < range.end) load(tile, 0);
    ptx::commit_copies();
    for (int stage = 0; tile < range.end; stage ^= 1) {
      const bool partial = kind == TileKind::partial;
      const int next = find(tile + 1);
      ptx::wait_for_copies<0>();
      __syncthreads();  // this tile is here, and nobody reads the other buffer any more
      if (next < range.end) load(next, stage ^ 1);
      ptx::commit_copies();
      const Tile<D> keys = buffer(2 * stage), values = buffer(2 * stage + 1);
      if (careful && partial) {
        clean_tile<T, N>(keys, nullptr);
        __syncthreads();
      }
      const int64_t first = int64_t(line) * a.T;
      const RowsAreQueries<M, N> place{v, a, of_rows, first, row_of(ptx::thread_now()), tile * N};
      const TileBits<M> bits(place, partial, a.dropout);
      float p[M][N / 8][4] = {}, ds[M][N / 8][4] = {};
      multiply_rows<T, M, N>(p, queries, of_warp, keys);
      multiply_rows<T, M, N>(ds, grad_outs, of_warp, values);
      score_gradients<T, M, N>(p, ds, a, place, bits, partial, batch * a.bias.batch + head * a.bias.head,
                               a.grad_bias == nullptr ? nullptr : a.grad_bias + first * a.S);
      if (a.softcap > 0) {
        float products[M][N / 8][4] = {};
        multiply_rows<T, M, N>(products, queries, of_warp, keys);
        cap_gradients<M, N>(ds, products, a);
      }
      multiply_weights<T, M, N>(sum, ds, keys);
      tile = next;
    }
    ptx::wait_for_copies<0>();  // of the operands that stay, where no tile was visited
    if (!__syncthreads_or(has_nan<M, D>(sum)) || careful) break;
  }
  multiply_all<M, D>(sum, a.scale);
  store_rows<T, M>(sum, queries, of_warp, a.grad_query, a.of_queries(a.grad_query, batch, head), t + of_warp, v.T);
}

}  // namespace

template <class T>
void attention_bwd_query(const BackwardArguments& a, const TensorView& query, const Launch& launch) {
  by_head_width("attention_bwd", std::max(a.query.width, a.value.width), [&](auto width) {
    using Cut = QueryCut<width()>;
    const int64_t blocks = ceil_div(a.T, Cut::queries) * a.B * a.H;
    start("attention_bwd: query", query, attention_bwd_query_kernel<T, width()>,
          Shape{dim3(unsigned(blocks)), dim3(threads), size_t(Cut::shared_bytes)}, launch, a);
  });
}

template void attention_bwd_query<__half>(const BackwardArguments&, const TensorView&, const Launch&);
template void attention_bwd_query<__nv_bfloat16>(const BackwardArguments&, const TensorView&, const Launch&);

}  // namespace pytransformer::cuda
