// Masked softmax attention, forward: one pass over the keys with a running softmax.
//
// A block owns 16 M queries of one head for each of its four warps and walks over tiles of keys and values. No score
// is ever stored: a warp keeps, for each of its queries, the largest score so far, the sum of exponentials and the
// weighted sum of values, all in registers, and rescales them when a larger score turns up, which after the first
// tiles is rare. Memory traffic is q, k, v and out; k and v are read once for each block of queries, mostly from the
// L2 cache.
//
// Both products run on tensor cores (mma.sync, m16n8k16, float32 sums). Queries stay in shared memory, from where
// ldmatrix makes left operands of them; keys and values come by cp.async into one of two buffers while the tile before
// is worked on, with one barrier a tile. Their copies are begun between the two products: what it takes to find their
// addresses is done while tensor cores are busy, and not between a barrier and what all warps wait for. The weights
// that the first product leaves in registers are, rounded and packed in pairs, the left operand of the second. Where
// M is 2, a fragment of keys serves two products: shared memory delivers 128 bytes a clock, and with M = 1 all of that
// would go into feeding the tensor cores.
//
// Tiles that nobody sees are skipped; tiles that all queries see whole look at no mask (attention_scores.cuh). A
// weight of 0 does not hide a value of NaN or Inf. Looking for such values would cost every partial tile, so the block
// looks at its result instead: where that holds a NaN, it starts over with values cleaned in partial tiles, and the
// queries that do see an unclean key are set to NaN.
//
// `Grouped` serves decoding: rows are the few queries of all heads that share a key head, one head after the other; a
// block takes one share of the keys and leaves float32 results for attention_decode.cu to combine. Keys and values may
// then lie in pages: who copies a row of a tile looks up its page first, and no row is copied that nobody sees.
//
// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023.
#pragma once

#include "attention_fwd.cuh"

namespace pytransformer::cuda {

// How a head width is cut. All fit into 99 KB, D <= 64 thrice, and into registers without spilling.
template <int D, bool Grouped>
struct ForwardCut {
  static constexpr int M = Grouped || D > 128 ? 1 : 2;  // fragments of 16 queries a warp
  static constexpr int queries = 16 * M * warps;
  static constexpr int keys = 32;
  // Of a multiprocessor: more leave fewer registers, and what waits for memory wants many.
  static constexpr int blocks = D <= 64 ? 3 + Grouped : D <= 128 ? 2 + Grouped : 2;
  static constexpr int stages = 2;
  static constexpr int tiles_bytes = tile_bytes<D>(queries + 2 * stages * keys);  // a ForwardBlock lies behind them
};

// What a block knows of itself, in shared memory.
template <bool Grouped>
struct ForwardBlock {
  BlockRows<Grouped> rows;
  Visibility visibility;
  bool careful;     // in a second pass, with values cleaned
  uint32_t spoilt;  // a bit for each key of a tile whose values had to be
};

// Keys [first, first + ROWS) of one head, or their values; those outside of [from, end), which nobody sees, are zeros.
template <int ROWS, int D>
__device__ inline void load_keys(Tile<D> tile, const Heads& x, int64_t head_offset, const Pages& pages, int batch,
                                 int first, int from, int end) {
  const uint16_t* head = static_cast<const uint16_t*>(x.data) + head_offset;
  load_tile<ROWS>(tile, x.width, [&](int row) -> const uint16_t* {
    const int key = first + row;
    if (key < from || key >= end) return nullptr;
    if (pages.table == nullptr) return head + x.row * key;
    const int index = pages.index(key);
    return head + x.batch * pages.table[batch * pages.stride + index] + x.row * (key - index * pages.size);
  });
}

// One pass of a block over its keys.
template <class T, int D, bool Grouped>
__device__ inline void attend(RunningSoftmax<ForwardCut<D, Grouped>::M, D>& softmax, const ForwardArguments& a,
                              ForwardBlock<Grouped>& block, uint32_t memory, Range range) {
  using Cut = ForwardCut<D, Grouped>;
  constexpr int M = Cut::M, N = Cut::keys;
  const BlockRows<Grouped>& rows = block.rows;
  const Visibility& v = block.visibility;
  const Tile<D> queries{memory};
  const auto buffer = [&](int i) { return Tile<D>{memory + tile_bytes<D>(Cut::queries + i * N)}; };
  const int batch = Grouped && a.pages.table != nullptr ? 0 : rows.batch;  // a pool belongs to all sequences
  const int64_t key_offset = a.of_keys(a.key, batch, rows.head / a.group);
  const int64_t value_offset = a.of_keys(a.value, batch, rows.head / a.group);
  TileKind kind = TileKind::empty;  // of the tile found last
  const auto find = [&](int tile) {
    for (; tile < range.end; ++tile) {
      kind = tile_kind<Cut::queries, N>(a, v, range.inside(tile), rows.first, tile * N);
      if (kind != TileKind::empty) break;
    }
    return tile;
  };
  const HeadRows<N, D> of_keys(a.key, key_offset), of_values(a.value, value_offset);
  const int length = v.length;
  // Keys and values of a tile, or zeros where there is none.
  const auto load = [&](int tile, int stage) {
    const bool there = tile < range.end;
    if constexpr (!Grouped) {
      const TileCopy<D> copy;
      of_keys.load(copy, buffer(2 * stage), tile * N, there ? length : 0);
      of_values.load(copy, buffer(2 * stage + 1), tile * N, there ? length : 0);
    } else if (there) {
      load_keys<N>(buffer(2 * stage), a.key, key_offset, a.pages, rows.batch, tile * N, v.lower, v.length);
      load_keys<N>(buffer(2 * stage + 1), a.value, value_offset, a.pages, rows.batch, tile * N, v.lower, v.length);
    }
    ptx::commit_copies();
  };
  const auto row = [&] { return rows.first + 16 * M * warp() + lane_row(); };
  const bool idle = Grouped && rows.first + 16 * M * warp() >= rows.end;  // of few queries most warps only copy
  int tile = find(range.tile);
  load(tile, 0);
  softmax.reset();
  for (int stage = 0; tile < range.end; stage ^= 1) {
    const bool partial = kind == TileKind::partial;
    const int next = find(tile + 1), s = tile * N;
    ptx::wait_for_copies<0>();
    __syncthreads();  // this tile is here, and nobody reads the other buffer any more
    if (Grouped) load(next, stage ^ 1);
    const Tile<D> keys = buffer(2 * stage), values = buffer(2 * stage + 1);
    if (partial && block.careful) {
      if (threadIdx.x == 0) block.spoilt = 0;
      __syncthreads();
      clean_tile<T, N>(values, &block.spoilt);
      __syncthreads();
    }
    if (!idle) {
      float x[M][N / 8][4] = {};
      multiply_rows<T, M, N>(x, RowsInTile<M, D>(queries, 16 * M * warp()), keys);
      const Asked asked(a, partial);
      if (asked.shapes) shape_scores<T, M, N>(x, a, rows, row(), s);
      if (asked.hides) {
        const uint32_t seeing = hide_scores<M, N>(x, v, rows, row(), s, block.careful ? &block.spoilt : nullptr);
        if (seeing != 0) softmax.spoil(seeing);
      }
      if (!Grouped) load(next, stage ^ 1);  // while tensor cores are busy
      softmax.template take_in<N>(x, score_factor(a, asked));
      if (asked.drops) {
        const int64_t first = (int64_t(rows.batch) * a.H + rows.head) * a.T;
        drop_weights<M, N>(x, Dropout(a.dropout), first + row(), s, a.S);
      }
      multiply_weights<T, M, N>(softmax.total, x, values);
    }
    tile = next;
  }
  ptx::wait_for_copies<0>();  // of the queries, where no tile was visited
}

// A warp's 16 rows, of which `rows` exist, as float32 [rows,width].
template <int D>
__device__ inline void store_parts(const float (&x)[D / 8][4], float* to, int width, int rows) {
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane_row() + i / 2 * 8, column = 8 * n + lane_column() + i % 2;
      if (row < rows && column < width) to[row * width + column] = x[n][i];
    }
  }
}

// Writes what a block has found.
template <class T, int D, bool Grouped>
__device__ inline void store_results(RunningSoftmax<ForwardCut<D, Grouped>::M, D>& softmax, const ForwardArguments& a,
                                     const BlockRows<Grouped>& rows, Tile<D> free) {
  using Cut = ForwardCut<D, Grouped>;
  const int of_warp = 16 * Cut::M * warp();
  const int64_t of_split = (int64_t(rows.block * a.B) * a.H + rows.line) * a.T;
  const int64_t of_head = rows.batch * a.lse_batch + rows.head * a.lse_head + a.before_queries(rows.batch);
  const int64_t first = Grouped ? of_split : of_head;  // of the rows of lse
#pragma unroll
  for (int i = 0; i < 2 * Cut::M; ++i) {
    const int row = rows.first + of_warp + lane_row() + 8 * i;
    const float lse = softmax.finish(i / 2, i % 2, a.dropout.scale);
    if (row < rows.end && lane() % 4 == 0) a.lse[first + row] = lse;
  }
  if constexpr (Grouped) {
    store_parts<D>(softmax.total[0], a.parts + (first + of_warp) * a.value.width, a.value.width, rows.end - of_warp);
  } else {
    const int64_t offset = a.of_queries(a.out, rows.batch, rows.head);
    store_rows<T, Cut::M>(softmax.total, free, of_warp, a.out, offset, rows.first + of_warp, rows.end);
  }
}

template <class T, int D, bool Grouped>
__global__ void __launch_bounds__(threads, ForwardCut<D, Grouped>::blocks)
    attention_fwd_kernel(const __grid_constant__ ForwardArguments a) {
  using Cut = ForwardCut<D, Grouped>;
  constexpr int M = Cut::M;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t memory = ptx::shared_address(shared);
  auto& block = *reinterpret_cast<ForwardBlock<Grouped>*>(shared + Cut::tiles_bytes);
  const BlockRows<Grouped>& rows = block.rows;
  const Visibility& v = block.visibility;
  if (threadIdx.x == 0) {
    block.rows = BlockRows<Grouped>(a, Cut::queries, int(blockIdx.x));
    block.visibility = Visibility(a, rows.batch, rows.head);
    block.careful = false;
  }
  __syncthreads();
  if (rows.first >= rows.end) return;  // of a sequence that is shorter than the longest
  Range range = key_tiles<Cut::queries, Cut::keys>(v, rows.query(rows.first, a.T));
  if (Grouped) {
    // A table of pages is often far wider than the sequence is long: shares are then cut from what is there.
    const bool paged = a.pages.table != nullptr;
    const int from = paged ? range.tile : 0, count = max(range.end - range.tile, 0);
    const int share = paged ? (count + rows.blocks - 1) / rows.blocks : a.share / Cut::keys;
    range.tile = max(range.tile, from + rows.block * share);
    range.end = min(range.end, from + (rows.block + 1) * share);
  }
  const int64_t of_query = a.of_queries(a.query, rows.batch, rows.head);
  if constexpr (Grouped) {
    load_tile<Cut::queries>(Tile<D>{memory}, a.query.width, [&](int row) -> const uint16_t* {
      if (row >= rows.end) return nullptr;
      const uint16_t* query = static_cast<const uint16_t*>(a.query.data) + of_query;
      return query + rows.member(row, a.T) * a.query.head + rows.query(row, a.T) * a.query.row;
    });
  } else {
    const HeadRows<Cut::queries, D> queries(a.query, of_query);
    queries.load({}, Tile<D>{memory}, rows.first, rows.end);
  }
  RunningSoftmax<M, D> softmax;
#pragma unroll 1
  for (;;) {
    attend<T, D, Grouped>(softmax, a, block, memory, range);
    const bool last = block.careful;
    if (!__syncthreads_or(has_nan<M, D>(softmax.total)) || last) break;
    if (threadIdx.x == 0) block.careful = true;  // seen by all from the barrier of the first tile on
  }
  store_results<T, D, Grouped>(softmax, a, rows, Tile<D>{memory});
}

}  // namespace pytransformer::cuda
