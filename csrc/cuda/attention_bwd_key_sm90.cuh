// What passes by blocks of keys in Hopper's kernels: tiles of queries, of all heads that share them.
#pragma once

#include "attention_bwd.cuh"
#include "attention_hopper.cuh"

namespace pytransformer::cuda {

// Queries and gradients of the output, for blocks of keys.
struct QueriesPass {
  using Rows = KeyRows;

  template <class Cut, class F>
  __device__ static void each_tile(const AttentionArguments& a, const Rows& rows, const Visibility& v, const F& f) {
    const Range range = query_tiles<Cut::tile_rows, Cut::block_rows>(v, rows.first);
    for (int member = 0; member < a.group; ++member) {
      for (int tile = range.tile; tile < range.end; ++tile) {
        const int t = tile * Cut::tile_rows;
        const TileKind kind =
            tile_kind<Cut::tile_rows, Cut::block_rows>(a, v, range.inside(tile), t, rows.first, member);
        if (kind != TileKind::empty) f(member, tile, kind == TileKind::partial);
      }
    }
  }
  __host__ __device__ static const Heads& streamed(const BackwardArguments& a, bool second) {
    return second ? a.grad_out : a.query;
  }
  static MapSize size(const AttentionArguments& a) { return {a.B, a.H, a.T, a.cu_seq_q != nullptr}; }
  __device__ static HeadPlace place(const AttentionArguments& a, const Rows& rows, int member) {
    return {rows.batch, rows.head + member, a.before_queries(rows.batch)};
  }
  __device__ static int end(const Visibility& v) { return v.T; }

  // The lse and delta of a tile, by the threads that copy its queries.
  template <class Block>
  __device__ static void copy_statistics(const BackwardArguments& a, Block& block, const Rows& rows, int stage,
                                         int member, int first, int end, int thread) {
    constexpr int N = sizeof(block.of_tile[0][0]) / sizeof(float);
#pragma unroll
    for (int i = thread; i < 2 * N; i += 64) {
      const int row = first + i % N;
      const float* from = (i < N ? a.lse_in_log2 : a.delta) + a.of_rows(rows.batch, rows.head + member) + row;
      ptx::copy_4_async(ptx::shared_address(&block.of_tile[stage][i / N][i % N]), from, row < end);
    }
  }
};

// Where a warpgroup is in what passes by: tiles `ahead` of that which is next to be freed.
template <class Cut>
struct QueriesAtHand {
  HopperBlock<Cut>& block;
  HopperTiles<Cut> tiles;
  HopperProgress& progress;
  int member = 0;  // of the heads, that of the tile found last

  __device__ Panels<Cut::tile_rows, Cut::D> queries(int ahead) const { return tiles.first(progress.first + ahead); }
  __device__ Panels<Cut::tile_rows, Cut::D> grad_outs(int ahead) const { return tiles.second(progress.second + ahead); }

  __device__ int next_tile(int ahead) {
    block.first.wait_until_full(progress.first + ahead);
    member = block.member[block.first.of(progress.first + ahead)];
    return block.tile[block.first.of(progress.first + ahead)];
  }

  // The lse, or delta, of the columns of this lane.
  template <int N>
  __device__ void take_statistics(float2 (&of_columns)[N / 8], int ahead, int which) const {
    const int stage = block.first.of(progress.first + ahead);
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      of_columns[n] = *reinterpret_cast<const float2*>(&block.of_tile[stage][which][8 * n + lane_column()]);
    }
  }

  __device__ void release() {
    block.first.tell_free(progress.first++);
    block.second.tell_free(progress.second++);
  }
};

}  // namespace pytransformer::cuda
