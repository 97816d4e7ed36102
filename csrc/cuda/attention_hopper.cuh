// How the kernels of attention that use Hopper's own instructions are organised, and what they share: blocks of threads
// with four roles, which live as long as the kernel, one a multiprocessor.
//
//     64 threads copy keys      into one of two or three stages, by cp.async, and tell that it is full; then they wait
//     64 threads copy values    until the next is free. They run ahead, into the next block of queries, too.
//     two warpgroups compute    64 queries each, over the same tiles. Those that copy leave their registers to them.
//
// Copies are written by the generic proxy and read by the async one: who has copied fences before it tells.
#pragma once

#include "attention_scores.cuh"
#include "warpgroup.cuh"

namespace pytransformer::cuda {

// How a head width is cut: tiles of KEYS keys, of which KEY_STAGES are here at a time, and OPERANDS operands of
// products that have a row for each query. Of the registers that all threads are launched with, those that copy leave
// some to the others.
template <int WIDTH, int KEYS, int KEY_STAGES, int OPERANDS>
struct HopperCut {
  static constexpr int D = WIDTH, keys = KEYS, key_stages = KEY_STAGES, value_stages = 2;
  static constexpr int rows = 64, groups = 2, queries = rows * groups;  // of each warpgroup that computes
  static constexpr int loaders = 64, group = 128;  // threads that copy keys, or values; of a warpgroup that computes
  static constexpr int computing = groups * group, threads = 2 * loaders + computing;
  static constexpr int loader_registers = 56, group_registers = 224;
  static constexpr int operands_bytes = 2 * D * OPERANDS * queries;
  static constexpr int tiles_bytes =
      operands_bytes + 2 * D * keys * (key_stages + value_stages);  // a HopperBlock lies behind them
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
  HopperStage keys[3], values[2];
  int tile[3];          // in a stage: its first key, plus 1 where it is partial; -1: this block of queries has no more
  float2 of_rows[128];  // of each query, in the backward: lse and delta
  uint32_t unclean;     // not 0: some result held a NaN
  uint32_t spoilt[4];   // a bit for each key of a tile whose values had to be cleaned
};

template <class Cut>
struct HopperTiles {
  static constexpr int row_bytes = 2 * Cut::D;
  uint32_t memory;

  // Of operand `which`, the rows of one warpgroup.
  __device__ Panels<Cut::rows, Cut::D> queries(int group, int which = 0) const {
    return {memory + row_bytes * (which * Cut::queries + group * Cut::rows)};
  }
  __device__ Panels<Cut::keys, Cut::D> keys(int stage) const {
    return {memory + Cut::operands_bytes + row_bytes * stage * Cut::keys};
  }
  __device__ Panels<Cut::keys, Cut::D> values(int stage) const { return keys(Cut::key_stages + stage); }
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
template <class Cut>
__device__ inline bool next_block(HopperBlock& block, int number, const AttentionArguments& a, int thread, int count) {
  HopperRole& role = block.roles[number];
  ptx::barrier(of_role + number, count);  // nobody looks at the last one any more
  if (thread == 0) {
    do {
      ++role.round;
      role.more = role.index() < a.blocks;
      if (role.more) role.rows = BlockRows<false>(a, Cut::queries, role.index());
    } while (role.more && role.rows.first >= role.rows.end);
    if (role.more) role.visibility = Visibility(a, role.rows.batch, role.rows.head);
    if (!role.more) role.round = -1;  // there may be a second pass
  }
  ptx::barrier(of_role + number, count);
  return role.more;
}

// Copies the keys, or the values, of one pass over all blocks of queries. `uses` counts the stages filled.
template <class Cut, bool Values>
__device__ inline void load_all(const AttentionArguments& a, HopperBlock& block, HopperTiles<Cut> tiles, int& uses) {
  const BlockRows<false>& rows = block.roles[Values].rows;
  const Visibility& v = block.roles[Values].visibility;
  const Heads& from = Values ? a.value : a.key;
  const int thread = threadIdx.x % Cut::loaders;
  HopperStage* stages = Values ? block.values : block.keys;
  constexpr int count = Values ? Cut::value_stages : Cut::key_stages;
  const auto next_stage = [&] {
    const int stage = uses % count;
    stages[stage].wait_until_free(uses / count % 2);
    ++uses;
    return stage;
  };
  const auto tell = [&](int stage, int tile) {
    if (!Values && thread == 0) block.tile[stage] = tile;
  };
  while (next_block<Cut>(block, Values, a, thread, Cut::loaders)) {
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

template <class Cut, bool Values>
__device__ inline void load(const AttentionArguments& a, HopperBlock& block, HopperTiles<Cut> tiles) {
  int uses = 0;
#pragma unroll 1
  for (bool careful = false;; careful = true) {
    load_all<Cut, Values>(a, block, tiles, uses);
    __syncthreads();
    if (careful || block.unclean == 0) break;
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
__device__ inline int first_row(const HopperRole& role) {
  return role.rows.first + 64 * group_now() + thread_of_group() / 32 * 16;
}

// Begins to copy this warpgroup's rows of a tensor that lies like the queries.
template <class Cut>
__device__ inline void load_queries(const AttentionArguments& a, const Heads& from, const BlockRows<false>& rows,
                                    Panels<Cut::rows, Cut::D> to) {
  const int thread = thread_of_group();
  const uint16_t* first = first_chunk(from, a.of_queries(from, rows.batch, rows.head), thread);
  load_panels<Cut::group>(to, thread, first, from.row, rows.first + Cut::rows * group_now(), rows.end, from.width);
}

// sum (+)= a b^T, begun: the 64 rows of `a` by all N of `b`.
template <class T, int N, int D>
__device__ inline void begin_products_of_rows(float (&sum)[N / 8][4], Panels<64, D> a, Panels<N, D> b) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    ptx::WarpgroupProduct<T, N>::template of_rows<0>(sum, a.along_rows(k), b.along_rows(k), k > 0);
  }
}

// sum += w b, begun: weights in registers, of the N rows of `b`.
template <class T, int N, int D>
__device__ inline void begin_weighted_rows(float (&sum)[D / 8][4], const uint32_t (&weights)[N / 16][4],
                                           Panels<N, D> b) {
  constexpr int columns = D == 64 ? 64 : 128;
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
    ptx::WarpgroupProduct<T, columns>::template of_weights<0>(sum, weights[k], b.across_rows(0, k));
    if constexpr (D > 128) {
      ptx::WarpgroupProduct<T, D - 128>::template of_weights<16>(sum, weights[k], b.across_rows(2, k));
    }
  }
}

template <class T, int N>
__device__ inline void round_weights(uint32_t (&to)[N / 16][4], const float (&x)[N / 8][4]) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&group)[4] = x[2 * k + i / 2];
      to[k][i] = ptx::pack<T>(group[i % 2 * 2], group[i % 2 * 2 + 1]);
    }
  }
}

// The roles of a kernel, of which `pass(block, tiles, careful, progress)` is what a warpgroup that computes does, over
// all blocks of queries: a second time, with values (or keys) cleaned, where block.unclean was set.
template <class Cut, class Pass>
__device__ inline void play_roles(const AttentionArguments& a, unsigned char* shared, const Pass& pass) {
  const HopperTiles<Cut> tiles{ptx::shared_address(shared)};
  auto& block = *reinterpret_cast<HopperBlock*>(shared + Cut::tiles_bytes);
  if (threadIdx.x == 0) {
    for (HopperRole& role : block.roles) role.round = -1;
    for (HopperStage& stage : block.keys) stage.make(Cut::loaders / 32, Cut::computing / 32);
    for (HopperStage& stage : block.values) stage.make(Cut::loaders / 32, Cut::computing / 32);
    block.unclean = 0;
  }
  __syncthreads();
  if (threadIdx.x < 2 * Cut::loaders) {
    ptx::leave_registers<Cut::loader_registers>();
    if (threadIdx.x < Cut::loaders) {
      load<Cut, false>(a, block, tiles);
    } else {
      load<Cut, true>(a, block, tiles);
    }
  } else {
    ptx::take_registers<Cut::group_registers>();
    HopperProgress progress;
    if (group_now() == 1) ptx::arrive(turn, Cut::computing);  // the first turn is that of the first
#pragma unroll 1
    for (bool careful = false;; careful = true) {
      pass(block, tiles, careful, progress);
      __syncthreads();
      if (careful || block.unclean == 0) break;
    }
    if (group_now() == 0) ptx::barrier(turn, Cut::computing);
  }
}

// As by_head_width, for the widths whose panels are whole.
template <class Body>
void by_panels(const char* name, int64_t width, const Body& body) {
  if (width <= 64) return body(std::integral_constant<int, 64>());
  if (width <= 128) return body(std::integral_constant<int, 128>());
  if (width <= 192) return body(std::integral_constant<int, 192>());
  if (width <= 256) return body(std::integral_constant<int, 256>());
  fail(name, ": head dims go up to 256, got ", width);
}

}  // namespace pytransformer::cuda
