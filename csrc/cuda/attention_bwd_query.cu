// dQ, and the gradient of the bias: a block owns 16 M queries for each warp and walks over the keys
// (attention_bwd.cuh). With M = 1 all reading from shared memory would go into left operands that stay the same; up to
// 128 columns they fit into registers.
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
  static constexpr bool held = D > 64 && D <= 128;  // queries and grad_outs, in registers
  static constexpr int tiles_bytes = tile_bytes<D>(2 * queries + 2 * stages * keys);  // a QueryBlock lies behind them
};

// The queries of a block. In shared memory.
struct QueryBlock {
  Visibility visibility;
  BlockRows<false> rows;

  QueryBlock() = default;
  __device__ QueryBlock(const BackwardArguments& a, int queries, int index) : rows(a, queries, index) {
    visibility = Visibility(a, rows.batch, rows.head);
  }
};

template <class T, int D>
__global__ void __launch_bounds__(threads, 2) attention_bwd_query_kernel(const __grid_constant__ BackwardArguments a) {
  using Cut = QueryCut<D>;
  constexpr int M = Cut::M, N = Cut::keys;
  extern __shared__ __align__(128) unsigned char shared[];
  const auto tile_at = [memory = ptx::shared_address(shared)](int row) { return Tile<D>{memory + tile_bytes<D>(row)}; };
  const Tile<D> queries = tile_at(0), grad_outs = tile_at(Cut::queries);
  const auto buffer = [&](int i) { return tile_at(2 * Cut::queries + i * N); };

  auto& block = *reinterpret_cast<QueryBlock*>(shared + Cut::tiles_bytes);
  const Visibility& v = block.visibility;
  if (threadIdx.x == 0) block = QueryBlock(a, Cut::queries, int(blockIdx.x));
  __syncthreads();
  if (block.rows.first >= v.T) return;  // of a sequence that is shorter than the longest
  const Range range = key_tiles<Cut::queries, N>(v, block.rows.first);
  TileKind kind = TileKind::empty;  // of the tile found last
  const auto find = [&](int tile) {
    for (; tile < range.end; ++tile) {
      kind = tile_kind<Cut::queries, N>(a, v, range.inside(tile), block.rows.first, tile * N);
      if (kind != TileKind::empty) break;
    }
    return tile;
  };
  const HeadRows<N, D> of_keys(a.key, a.of_keys(a.key, block.rows.batch, block.rows.head / a.group));
  const HeadRows<N, D> of_values(a.value, a.of_keys(a.value, block.rows.batch, block.rows.head / a.group));
  const int length = v.length;
  // Keys and values of a tile, or zeros where there is none.
  const auto load = [&](int tile, int stage) {
    const TileCopy<D> copy;
    const int end = tile < range.end ? length : 0;
    of_keys.load(copy, buffer(2 * stage), tile * N, end);
    of_values.load(copy, buffer(2 * stage + 1), tile * N, end);
    ptx::commit_copies();
  };
  const auto of_queries = [&](const Heads& x) { return a.of_queries(x, block.rows.batch, block.rows.head); };
  HeadRows<Cut::queries, D>(a.query, of_queries(a.query)).load({}, queries, block.rows.first, v.T);
  HeadRows<Cut::queries, D>(a.grad_out, of_queries(a.grad_out)).load({}, grad_outs, block.rows.first, v.T);
  ptx::commit_copies();
  if constexpr (Cut::held) {
    ptx::wait_for_copies<0>();
    __syncthreads();
  }

  const int of_warp = 16 * M * warp();
  // The first row of a thread.
  const auto row_of = [&](int thread) { return block.rows.first + thread / 32 * 16 * M + thread % 32 / 4; };
  float2 of_rows[M][2];
#pragma unroll
  for (int i = 0; i < 2 * M; ++i) {
    const int row = row_of(threadIdx.x) + 8 * i;
    const int64_t at = a.of_rows(block.rows.batch, block.rows.head) + row;
    of_rows[i / 2][i % 2] = row < v.T ? float2{a.lse_in_log2[at], a.delta[at]} : float2{0, 0};
  }

  using Rows = std::conditional_t<Cut::held, RowsInRegisters<M, D>, RowsInTile<M, D>>;
  const Rows query_rows(queries, of_warp), grad_out_rows(grad_outs, of_warp);
  float sum[M][D / 8][4];
#pragma unroll 1
  for (bool careful = false;; careful = true) {
    set_zero<M, D>(sum);
    int tile = find(range.tile);
    load(tile, 0);
    for (int stage = 0; tile < range.end; stage ^= 1) {
      const bool partial = kind == TileKind::partial;
      const int next = find(tile + 1);
      ptx::wait_for_copies<0>();
      __syncthreads();  // this tile is here, and nobody reads the other buffer any more
      const Tile<D> keys = buffer(2 * stage), values = buffer(2 * stage + 1);
      if (careful && partial) {
        clean_tile<T, N>(keys, nullptr);
        __syncthreads();
      }
      const int64_t first = int64_t(block.rows.line) * a.T;
      const RowsAreQueries<M, N> place{v, a, of_rows, first, row_of(ptx::thread_now()), tile * N};
      const Asked asked(a, partial);
      TileBits<M> bits;
      if (asked.anything()) bits = TileBits<M>(place, asked);
      float p[M][N / 8][4] = {}, ds[M][N / 8][4] = {};
      multiply_rows<T, M, N>(p, query_rows, keys);
      multiply_rows<T, M, N>(ds, grad_out_rows, values);
      const auto to_gradients = [&](const Asked& asked) {
        load(next, stage ^ 1);  // while tensor cores are busy
        score_weights<T, M, N>(p, a, place, bits, asked,
                               block.rows.batch * a.bias.batch + block.rows.head * a.bias.head);
        score_gradients<M, N>(ds, p, a.dropout, place, bits, asked);
        if (asked.shapes && a.grad_bias != nullptr) store_grad_bias<M, N>(ds, place, a.grad_bias + first * a.S);
        if (asked.shapes && a.softcap > 0) {
          float products[M][N / 8][4] = {};
          multiply_rows<T, M, N>(products, query_rows, keys);
          cap_gradients<M, N>(ds, products, a);
        }
      };
      asked.anything() ? to_gradients(asked) : to_gradients({});
      multiply_weights<T, M, N>(sum, ds, keys);
      tile = next;
    }
    ptx::wait_for_copies<0>();  // of the operands that stay, where no tile was visited
    if (!__syncthreads_or(has_nan<M, D>(sum)) || careful) break;
  }
  multiply_all<M, D>(sum, a.scale);
  const int64_t offset = of_queries(a.grad_query);
  store_rows<T, M>(sum, queries, of_warp, a.grad_query, offset, block.rows.first + of_warp, v.T);
}

}  // namespace

template <class T>
void attention_bwd_query(const BackwardArguments& a, const TensorView& query, const Launch& launch) {
  const int widest = std::max(a.query.width, a.value.width);
  if constexpr (hopper_built) {
    if (hopper_serves(widest)) return attention_bwd_query_sm90<T>(a, query, launch);
  }
  by_head_width("attention_bwd", widest, [&](auto width) {
    using Cut = QueryCut<width()>;
    const int64_t blocks = ceil_div(a.T, Cut::queries) * a.B * a.H;
    start("attention_bwd: query", query, attention_bwd_query_kernel<T, width()>,
          Shape{dim3(unsigned(blocks)), dim3(threads), Cut::tiles_bytes + sizeof(QueryBlock)}, launch, a);
  });
}

template void attention_bwd_query<__half>(const BackwardArguments&, const TensorView&, const Launch&);
template void attention_bwd_query<__nv_bfloat16>(const BackwardArguments&, const TensorView&, const Launch&);

}  // namespace pytransformer::cuda
