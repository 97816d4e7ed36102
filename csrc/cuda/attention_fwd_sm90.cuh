// Masked softmax attention, forward, by Hopper's own instructions: products of whole warpgroups (warpgroup.cuh), which
// run beside the threads that began them. What it computes is what attention_fwd_sm80.cuh does, by other means.
//
// On Hopper mma.sync reaches two thirds of the tensor cores' rate, and leaves them idle while a warp is at its softmax.
// Here neither need be: a product takes its operands from shared memory by itself, so that one warpgroup's products and
// another's exponentials share a scheduler.
//
// A block of threads has four roles and lives as long as the kernel, one a multiprocessor:
//
//     64 threads copy keys      into either of two stages, by cp.async, and tell that it is full; then they wait until
//     64 threads copy values    the other is free. They run ahead, into the next block of queries, too.
//     two warpgroups compute    64 queries each, over the same tiles. Those that copy leave their registers to them.
//
// A warpgroup goes through a tile in this order (Shah et al., "FlashAttention-3", 2024, sec. 3):
//
//     begin  the scores of tile i + 1, and behind them the weighted values of tile i
//     wait   for the scores; the keys' stage is free. Their softmax, while tensor cores are at the values
//     wait   for the values; their stage is free. Rescale the total, where a larger score has turned up, round weights
//
// and the two take turns at the first step, so that one is at its softmax while the other's products run. The copies
// are written by the generic proxy and read by the async one: who has copied fences before it tells.
//
// Tiles are cut, masked and skipped as there: registers hold scores just as mma.sync leaves them, so the same functions
// see to masks, bias and dropout. A NaN in a result likewise has values cleaned in a second pass, here over all blocks
// of the multiprocessor: whoever copies is far ahead by the time that one is found.
//
// Sources: as there; Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision",
// 2024; PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include "attention_fwd.cuh"
#include "warpgroup.cuh"

namespace pytransformer::cuda {

// How a head width is cut. Of the registers that all threads are launched with, those that copy leave some to the
// others.
template <int D>
struct HopperCut {
  static constexpr int rows = 64, groups = 2, queries = rows * groups;  // of each warpgroup that computes
  static constexpr int keys = D <= 128 ? 128 : D <= 192 ? 64 : 32;
  static constexpr int stages = 2;
  static constexpr int loaders = 64, group = 128;  // threads that copy keys, or values; of a warpgroup that computes
  static constexpr int computing = groups * group, threads = 2 * loaders + computing;
  static constexpr int loader_registers = 56, group_registers = 224;
  static constexpr int tiles_bytes = 2 * D * (queries + 2 * stages * keys);  // a HopperBlock lies behind them
};

// Named barriers; 0 is that of __syncthreads().
enum HopperBarrier {
  of_role = 1,  // one each: who copies keys, values, and each warpgroup that computes
  of_computing = 5,
  turn = 6,  // of either warpgroup, to begin products
};

// What those of one role know of the block of queries that they are at.
struct HopperRole {
  int round;  // each multiprocessor takes one block a round
  bool more;  // there is one
  BlockRows<false> rows;
  Visibility visibility;

  // Blocks come with the longest first. Every other round is dealt out in reverse, so that nobody has all long ones.
  __device__ int index() const {
    const int turn = round % 2 == 0 ? int(blockIdx.x) : int(gridDim.x - 1 - blockIdx.x);
    return round * int(gridDim.x) + turn;
  }
};

// A tile's place in shared memory, which is filled and freed again and again: who waits for its n-th use waits for a
// phase of one of two barriers.
struct HopperStage {
  uint64_t full, free;  // where a warp arrives once: when it has copied its part, and when it has read all that it will

  __device__ void make(int loading_warps, int computing_warps) {
    ptx::make_barrier(ptx::shared_address(&full), loading_warps);
    ptx::make_barrier(ptx::shared_address(&free), computing_warps);
  }
  __device__ void wait_until_full(int parity) { ptx::wait_for_phase(ptx::shared_address(&full), parity); }
  __device__ void wait_until_free(int parity) { ptx::wait_for_phase(ptx::shared_address(&free), parity ^ 1); }
  __device__ void tell_full() { arrive(full); }
  __device__ void tell_free() { arrive(free); }

 private:
  __device__ static void arrive(const uint64_t& barrier) {
    __syncwarp();
    if (lane() == 0) ptx::arrive_at(ptx::shared_address(&barrier));
  }
};

// In shared memory, behind the tiles.
struct HopperBlock {
  HopperRole roles[4];
  HopperStage keys[2], values[2];
  int tile[2];         // in a stage: its first key, plus 1 where it is partial; -1: this block of queries has no more
  uint32_t unclean;    // not 0: some result held a NaN
  uint32_t spoilt[4];  // a bit for each key of a tile whose values had to be cleaned
};

template <int D>
struct HopperTiles {
  using Cut = HopperCut<D>;
  uint32_t memory;

  __device__ Panels<Cut::rows, D> queries(int group) const { return {memory + 2 * D * Cut::rows * group}; }
  __device__ Panels<Cut::keys, D> keys(int stage) const {
    return {memory + 2 * D * (Cut::queries + stage * Cut::keys)};
  }
  __device__ Panels<Cut::keys, D> values(int stage) const { return keys(Cut::stages + stage); }
};

// What thread `thread` of those that copy a head copies first of its row 0.
__device__ inline const uint16_t* first_chunk(const Heads& from, int64_t head_offset, int thread) {
  return static_cast<const uint16_t*>(from.data) + head_offset + from.row * (thread / 8) + 8 * (thread % 8);
}

// Begins to copy rows [first, first + ROWS) of a head, the work of COUNT threads; zeros from row `end` on and from
// column `width` on.
template <int COUNT, int ROWS, int D>
__device__ inline void load_panels(Panels<ROWS, D> tile, int thread, const uint16_t* first_chunk, int64_t stride,
                                   int first, int end, int width) {
  constexpr int step = COUNT / 8;  // rows of a thread are `step` apart: all in one place of the swizzle
  static_assert(step % 8 == 0 && ROWS % step == 0);
  const uint32_t to = tile.chunk(thread / 8, thread % 8);
  const uint16_t* from = first_chunk + stride * first;
#pragma unroll
  for (int i = 0; i < ROWS / step; ++i) {
    const bool there = first + thread / 8 + i * step < end;
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel) {
      const bool valid = there && 64 * panel + thread % 8 * 8 < width;
      ptx::copy_16_async(to + panel * tile.panel_bytes + i * step * tile.row_bytes, from + 64 * panel, valid);
    }
    from += stride * step;
  }
}

// What this thread has copied is there, for tensor cores too.
__device__ inline void finish_copies() {
  ptx::commit_copies();
  ptx::wait_for_copies<0>();
  ptx::fence_for_products();
}

// The next block of queries that has any, for the `count` threads of role `number`; false after the last one.
template <int D>
__device__ inline bool next_block(HopperBlock& block, int number, const ForwardArguments& a, int thread, int count) {
  HopperRole& role = block.roles[number];
  ptx::barrier(of_role + number, count);  // nobody looks at the last one any more
  if (thread == 0) {
    do {
      ++role.round;
      role.more = role.index() < a.blocks;
      if (role.more) role.rows = BlockRows<false>(a, HopperCut<D>::queries, role.index());
    } while (role.more && role.rows.first >= role.rows.end);
    if (role.more) role.visibility = Visibility(a, role.rows.batch, role.rows.head);
    if (!role.more) role.round = -1;  // there may be a second pass
  }
  ptx::barrier(of_role + number, count);
  return role.more;
}

// Copies the keys, or the values, of one pass over all blocks of queries. `uses` counts the stages filled.
template <int D, bool Values>
__device__ inline void load_all(const ForwardArguments& a, HopperBlock& block, HopperTiles<D> tiles, int& uses) {
  using Cut = HopperCut<D>;
  const BlockRows<false>& rows = block.roles[Values].rows;
  const Visibility& v = block.roles[Values].visibility;
  const Heads& from = Values ? a.value : a.key;
  const int thread = threadIdx.x % Cut::loaders;
  HopperStage* stages = Values ? block.values : block.keys;
  const auto next_stage = [&] {
    const int stage = uses % Cut::stages;
    stages[stage].wait_until_free(uses / Cut::stages % 2);
    ++uses;
    return stage;
  };
  const auto tell = [&](int stage, int tile) {
    if (!Values && thread == 0) block.tile[stage] = tile;
  };
  while (next_block<D>(block, Values, a, thread, Cut::loaders)) {
    const uint16_t* first = first_chunk(from, a.of_keys(from, rows.batch, rows.head / a.group), thread);
    const Range range = key_tiles<Cut::queries, Cut::keys>(v, rows.first);
    for (int tile = range.tile; tile < range.end; ++tile) {
      const TileKind kind = tile_kind<Cut::queries, Cut::keys>(a, v, range.inside(tile), rows.first, tile * Cut::keys);
      if (kind == TileKind::empty) continue;
      const int stage = next_stage();
      load_panels<Cut::loaders>(Values ? tiles.values(stage) : tiles.keys(stage), thread, first, from.row,
                                tile * Cut::keys, v.length, from.width);
      tell(stage, tile * Cut::keys + (kind == TileKind::partial));
      finish_copies();
      stages[stage].tell_full();
    }
    if (Values) continue;
    const int stage = next_stage();
    tell(stage, -1);
    stages[stage].tell_full();
  }
}

template <int D, bool Values>
__device__ inline void load(const ForwardArguments& a, HopperBlock& block, HopperTiles<D> tiles) {
  int uses = 0;
#pragma unroll 1
  for (bool careful = false;; careful = true) {
    load_all<D, Values>(a, block, tiles, uses);
    __syncthreads();
    if (careful || block.unclean == 0) break;
  }
}

// total += w v for 16 keys from 16 k on, begun.
template <class T, int ROWS, int D>
__device__ inline void weigh_values(float (&total)[D / 8][4], const uint32_t (&weights)[4], Panels<ROWS, D> values,
                                    int k) {
  constexpr int N = D == 64 ? 64 : 128;
  ptx::WarpgroupProduct<T, N>::template of_weights<0>(total, weights, values.across_rows(0, k));
  if constexpr (D > 128) {
    ptx::WarpgroupProduct<T, D - 128>::template of_weights<16>(total, weights, values.across_rows(2, k));
  }
}

// Which of the warpgroups that compute this is, and which of its threads: made where it is used, no register keeps it.
__device__ inline int group_now() {
  return ptx::thread_now() / 128 - 1;
}
__device__ inline int thread_of_group() {
  return ptx::thread_now() % 128;
}

// How many tiles a warpgroup has been through.
struct HopperProgress {
  int keys = 0, values = 0;
};

// The first of this warp's 16 queries.
template <int D>
__device__ inline int first_row(const HopperRole& role) {
  return role.rows.first + HopperCut<D>::rows * group_now() + thread_of_group() / 32 * 16;
}

// The queries of one warpgroup, in one block: results in `softmax`.
template <class T, int D>
__device__ inline void attend(RunningSoftmax<1, D>& softmax, const ForwardArguments& a, HopperBlock& block,
                              HopperTiles<D> tiles, bool careful, HopperProgress& progress) {
  using Cut = HopperCut<D>;
  constexpr int N = Cut::keys;
  const auto role = [&]() -> const HopperRole& { return block.roles[2 + group_now()]; };
  const auto row = [&] { return first_row<D>(role()) + thread_of_group() % 32 / 4; };
  float x[1][N / 8][4];         // scores, and then weights relative to the largest score
  uint32_t weights[N / 16][4];  // the same, rounded
  float (&total)[D / 8][4] = softmax.total[0];
  const auto next_tile = [&] {
    const int stage = progress.keys % Cut::stages;
    block.keys[stage].wait_until_full(progress.keys / Cut::stages % 2);
    return block.tile[stage];
  };
  const auto release_keys = [&] { block.keys[progress.keys++ % Cut::stages].tell_free(); };
  const auto begin_scores = [&] {
    const auto queries = tiles.queries(group_now());
    const auto keys = tiles.keys(progress.keys % Cut::stages);
    ptx::begin_products();
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      const uint64_t query = queries.along_rows(k), key = keys.along_rows(k);
      ptx::WarpgroupProduct<T, N>::template of_rows<0>(x[0], query, key, k > 0);
    }
    ptx::commit_products();
  };
  const auto values = [&] { return tiles.values(progress.values % Cut::stages); };
  const auto wait_for_values = [&] {
    block.values[progress.values % Cut::stages].wait_until_full(progress.values / Cut::stages % 2);
  };
  const auto begin_total = [&] {
    if (!careful) wait_for_values();
    ptx::held(weights);
    ptx::held(total);
    ptx::begin_products();
#pragma unroll
    for (int k = 0; k < N / 16; ++k) weigh_values<T>(total, weights[k], values(), k);
    ptx::commit_products();
  };
  // Values that are not finite are set to 0, by both warpgroups before either multiplies by them.
  const auto clean_values = [&] {
    const int thread = int(threadIdx.x) - 2 * Cut::loaders;
    ptx::barrier(of_computing, Cut::computing);  // nobody reads of the tile before any more
    if (thread < N / 32) block.spoilt[thread] = 0;
    ptx::barrier(of_computing, Cut::computing);
    clean_tile<T, N>(values(), block.spoilt, thread, Cut::computing);
    ptx::fence_for_products();
    ptx::barrier(of_computing, Cut::computing);
  };

  softmax.reset();
  int tile = next_tile();
  if (tile < 0) return release_keys();
  begin_scores();
  ptx::wait_for_products<0>();
  ptx::held(x[0]);
  release_keys();
  for (bool first = true;; first = false) {
    const int s = tile & ~1;
    const Asked asked(a, tile & 1);
    uint32_t seeing = 0;
    if (careful) wait_for_values();
    if (asked.shapes) shape_scores<T, 1, N>(x, a, role().rows, row(), s);
    if (asked.hides) {
      if (careful) clean_values();
      seeing = hide_scores<1, N>(x, role().visibility, role().rows, row(), s, careful ? block.spoilt : nullptr);
    }
    float rescale[1][2];
    const float factor = score_factor(a, asked);
    const bool raised = softmax.raise_largest<N>(x, factor, rescale);
    if (raised) softmax.multiply_sums(rescale);
    softmax.add_weights<N>(x, factor);
    if (asked.drops) {
      const int64_t before = (int64_t(role().rows.batch) * a.H + role().rows.head) * a.T;
      drop_weights<1, N>(x, Dropout(a.dropout), before + row(), s, a.S);
    }
    ptx::wait_for_products<0>();  // of the tile before
    ptx::held(total);
    ptx::held(weights);
    if (!first) block.values[(progress.values - 1) % Cut::stages].tell_free();
    if (raised) softmax.multiply_total(rescale);
    if (seeing != 0) softmax.spoil(seeing);
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[k][i] = ptx::pack<T>(x[0][2 * k + i / 2][i % 2 * 2], x[0][2 * k + i / 2][i % 2 * 2 + 1]);
    }
    tile = next_tile();
    if (tile < 0) break;
    ptx::barrier(turn + group_now(), Cut::computing);
    begin_scores();
    begin_total();
    ptx::arrive(turn + 1 - group_now(), Cut::computing);
    ptx::wait_for_products<1>();  // of the scores
    ptx::held(x[0]);
    release_keys();
    ++progress.values;
  }
  release_keys();
  begin_total();
  ptx::wait_for_products<0>();
  ptx::held(total);
  block.values[progress.values++ % Cut::stages].tell_free();
}

// The queries of this warpgroup, by its own threads.
template <int D>
__device__ inline void load_queries(const ForwardArguments& a, const BlockRows<false>& rows,
                                    Panels<HopperCut<D>::rows, D> queries) {
  const int thread = thread_of_group();
  const uint16_t* first = first_chunk(a.query, a.of_queries(a.query, rows.batch, rows.head), thread);
  load_panels<HopperCut<D>::group>(queries, thread, first, a.query.row, rows.first + HopperCut<D>::rows * group_now(),
                                   rows.end, a.query.width);
  finish_copies();
}

// Writes what a warpgroup has found, by way of where its queries were.
template <class T, int D>
__device__ inline void store_results(RunningSoftmax<1, D>& softmax, const ForwardArguments& a, const HopperRole& role,
                                     Panels<HopperCut<D>::rows, D> queries) {
  const BlockRows<false>& rows = role.rows;
  const int first = first_row<D>(role);
  const int64_t of_head = rows.batch * a.lse_batch + rows.head * a.lse_head + a.before_queries(rows.batch);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane_row() + 8 * half;
    const float lse = softmax.finish(0, half, a.dropout.scale);
    if (row < rows.end && lane() % 4 == 0) a.lse[of_head + row] = lse;
  }
  const int64_t offset = a.of_queries(a.out, rows.batch, rows.head);
  store_rows<T, 1>(softmax.total, queries, thread_of_group() / 32 * 16, a.out, offset, first, rows.end);
}

// One pass of a warpgroup over all blocks.
template <class T, int D>
__device__ inline void attend_all(const ForwardArguments& a, HopperBlock& block, HopperTiles<D> tiles, bool careful,
                                  HopperProgress& progress) {
  using Cut = HopperCut<D>;
  while (next_block<D>(block, 2 + group_now(), a, thread_of_group(), Cut::group)) {
    load_queries<D>(a, block.roles[2 + group_now()].rows, tiles.queries(group_now()));
    ptx::barrier(of_role + 2 + group_now(), Cut::group);
    RunningSoftmax<1, D> softmax;
    attend<T, D>(softmax, a, block, tiles, careful, progress);
    if (has_nan<1, D>(softmax.total)) atomicOr(&block.unclean, 1u);
    store_results<T, D>(softmax, a, block.roles[2 + group_now()], tiles.queries(group_now()));
  }
}

template <class T, int D>
__global__ void __launch_bounds__(HopperCut<D>::threads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ ForwardArguments a) {
  using Cut = HopperCut<D>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const HopperTiles<D> tiles{ptx::shared_address(shared)};
  auto& block = *reinterpret_cast<HopperBlock*>(shared + Cut::tiles_bytes);
  if (threadIdx.x == 0) {
    for (HopperRole& role : block.roles) role.round = -1;
    for (int i = 0; i < Cut::stages; ++i) {
      block.keys[i].make(Cut::loaders / 32, Cut::computing / 32);
      block.values[i].make(Cut::loaders / 32, Cut::computing / 32);
    }
    block.unclean = 0;
  }
  __syncthreads();
  if (threadIdx.x < 2 * Cut::loaders) {
    ptx::leave_registers<Cut::loader_registers>();
    if (threadIdx.x < Cut::loaders) {
      load<D, false>(a, block, tiles);
    } else {
      load<D, true>(a, block, tiles);
    }
  } else {
    ptx::take_registers<Cut::group_registers>();
    HopperProgress progress;
    if (group_now() == 1) ptx::arrive(turn, Cut::computing);  // the first turn is that of the first
#pragma unroll 1
    for (bool careful = false;; careful = true) {
      attend_all<T, D>(a, block, tiles, careful, progress);
      __syncthreads();
      if (careful || block.unclean == 0) break;
    }
    if (group_now() == 0) ptx::barrier(turn, Cut::computing);
  }
}

}  // namespace pytransformer::cuda
