// How the kernels of attention that use Hopper's own instructions are organised, and what they share: blocks of threads
// with four roles, which live as long as the kernel, one a multiprocessor. A block of threads takes one block of rows
// after the other, 128 queries of a head, or keys; by these pass tiles of the other kind.
//
//     copying     64 threads for each of a tile's two operands, into two or three stages, the next tile while one is
//                 under way. They wait until a stage is free, tell that it is full, and run ahead, into the next block,
//                 too. A tile whose rows are all there is asked of the copy engine (tensor_map.h), by one thread; the
//                 engine's bytes count where the others tell. The last tile of a sequence they copy by cp.async, with
//                 zeros behind its end, of which a map knows nothing.
//     computing   two warpgroups, 64 rows each, over the same tiles. The others leave most of their registers to them.
//
// What cp.async copies is written by the generic proxy and read by the async one: who has copied fences before it
// tells.
//
// What passes by is up to a `Stream`: KeysPass here, keys and values for blocks of queries; QueriesPass in
// attention_bwd_key_sm90.cuh, queries and gradients for blocks of keys.
#pragma once

#include <algorithm>

#include "attention_scores.cuh"
#include "device.h"
#include "launch.h"
#include "tensor_map.h"
#include "warpgroup.cuh"

namespace pytransformer::cuda {

// How a head width is cut: a Stream of tiles of TILE_ROWS rows, of whose two operands FIRST and SECOND are here at a
// time, and OPERANDS operands of products that have a row for each row of a block. Warpgroups have other rows of it, or
// the same. Of the registers that all threads are launched with, those that copy leave some to the others.
template <class Stream, int WIDTH, int TILE_ROWS, int FIRST, int SECOND, int OPERANDS, bool SAME_ROWS = false>
struct HopperCut : Stream {
  static constexpr int D = WIDTH, tile_rows = TILE_ROWS, first_stages = FIRST, second_stages = SECOND;
  static constexpr int rows = 64, groups = 2;  // of each warpgroup that computes
  static constexpr int block_rows = SAME_ROWS ? rows : rows * groups, rows_apart = block_rows - rows;
  static constexpr int loaders = 64, group = 128;  // threads that copy one operand; of a warpgroup that computes
  static constexpr int computing = groups * group, threads = 2 * loaders + computing;
  static constexpr int loader_registers = 56, group_registers = 224;
  static constexpr int operands_bytes = 2 * D * OPERANDS * block_rows;
  // A HopperBlock lies behind them.
  static constexpr int tiles_bytes = operands_bytes + 2 * D * tile_rows * (first_stages + second_stages);
};

// Named barriers. All threads meet at one of these, too: __syncthreads() is for who comes to the same place.
enum HopperBarrier {
  of_all = 0,
  of_role = 1,  // one each: who copies, and each warpgroup that computes
  of_computing = 5,
  turn = 6,  // of either warpgroup, to begin products, or whatever else they take turns at
};

// What those of one role know of the block of rows that they are at.
template <class Rows>
struct HopperRole {
  int round;  // each multiprocessor takes one block a round
  bool more;  // there is one
  Rows rows;
  Visibility visibility;

  // Blocks come with the longest first. Every other round is dealt out in reverse, so that nobody has all long ones.
  __device__ int index() const {
    const int turn = round % 2 == 0 ? int(blockIdx.x) : int(gridDim.x - 1 - blockIdx.x);
    return round * int(gridDim.x) + turn;
  }
};

// A place as a map of the tensor has it (tensor_map_sm90.cu): a dimension that is broadcast has one entry there.
__device__ inline HeadPlace in_map(const HeadPlace& place, const Heads& x) {
  return {x.batch == 0 ? 0 : place.batch, x.head == 0 ? 0 : place.head, place.before};
}

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
  // To all lanes of a warp.
  __device__ bool is_free(int parity) const {
    return __all_sync(all_lanes, ptx::phase_is_over(ptx::shared_address(&free), parity ^ 1));
  }
  __device__ void tell_full() { arrive(full); }
  __device__ void tell_free() { arrive(free); }

  // By one thread: what is told of has D columns of N rows of a head, from row `first` on.
  template <int N, int D>
  __device__ void load_boxes(Panels<N, D> to, const TileMap& map, const HeadPlace& head, int first) {
    ptx::expect_bytes(ptx::shared_address(&full), N * D * 2);
#pragma unroll
    for (int panel = 0; panel < D / 64; ++panel) {
      ptx::load_box(to.base + panel * to.panel_bytes, &map.map, 64 * panel, head.before + first, head.head, head.batch,
                    ptx::shared_address(&full));
    }
  }

 private:
  __device__ static void arrive(const uint64_t& barrier) {
    __syncwarp();
    if (lane() == 0) ptx::arrive_at(ptx::shared_address(&barrier));
  }
};

// The stages of one operand, by how often they have been used.
template <int COUNT>
struct HopperStages {
  HopperStage stage[COUNT];

  __device__ static int of(int use) { return use % COUNT; }
  __device__ void wait_until_full(int use) { stage[of(use)].wait_until_full(use / COUNT % 2); }
  __device__ void wait_until_free(int use) { stage[of(use)].wait_until_free(use / COUNT % 2); }
  __device__ bool is_free(int use) const { return stage[of(use)].is_free(use / COUNT % 2); }
  __device__ void tell_full(int use) { stage[of(use)].tell_full(); }
  __device__ void tell_free(int use) { stage[of(use)].tell_free(); }
};

// In shared memory, behind the tiles.
template <class Cut>
struct HopperBlock {
  HopperRole<typename Cut::Rows> roles[4];
  HopperStages<Cut::first_stages> first;
  HopperStages<Cut::second_stages> second;
  int tile[Cut::first_stages];  // in a stage: its first row, plus 1 where it is partial; -1: this block has no more
  int member[Cut::first_stages];
  uint32_t unclean;    // not 0: some result held a NaN
  uint32_t spoilt[4];  // a bit for each row of a tile that had to be cleaned
  // Of queries, in the backward, lse and delta: of a block's rows, or of a tile's.
  float2 of_rows[Cut::block_rows];
  float of_tile[Cut::first_stages][2][Cut::tile_rows];
};

template <class Cut>
struct HopperTiles {
  static constexpr int row_bytes = 2 * Cut::D;
  uint32_t memory;

  // Of operand `which`, the rows of one warpgroup.
  __device__ Panels<Cut::rows, Cut::D> own(int group, int which = 0) const {
    return {memory + row_bytes * (which * Cut::block_rows + group * Cut::rows_apart)};
  }
  __device__ Panels<Cut::tile_rows, Cut::D> first(int use) const { return stage(use % Cut::first_stages); }
  __device__ Panels<Cut::tile_rows, Cut::D> second(int use) const {
    return stage(Cut::first_stages + use % Cut::second_stages);
  }

 private:
  __device__ Panels<Cut::tile_rows, Cut::D> stage(int i) const {
    return {memory + Cut::operands_bytes + row_bytes * i * Cut::tile_rows};
  }
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
#pragma unroll(D > 128 ? 1 : ROWS / step)
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

// What this thread has copied is there, for tensor cores too; not yet that of the last LATER groups of copies.
template <int LATER = 0>
__device__ inline void finish_copies() {
  ptx::wait_for_copies<LATER>();
  ptx::fence_async_proxy();
}

// Keys and values, for blocks of queries.
struct KeysPass {
  using Rows = BlockRows<false>;

  // f(member, tile, partial) for each tile that a block sees some of.
  template <class Cut, class F>
  __device__ static void each_tile(const AttentionArguments& a, const Rows& rows, const Visibility& v, const F& f) {
    const Range range = key_tiles<Cut::block_rows, Cut::tile_rows>(v, rows.first);
    for (int tile = range.tile; tile < range.end; ++tile) {
      const TileKind kind =
          tile_kind<Cut::block_rows, Cut::tile_rows>(a, v, range.inside(tile), rows.first, tile * Cut::tile_rows);
      if (kind != TileKind::empty) f(0, tile, kind == TileKind::partial);
    }
  }
  __host__ __device__ static const Heads& streamed(const AttentionArguments& a, bool second) {
    return second ? a.value : a.key;
  }
  static MapSize size(const AttentionArguments& a) { return {a.B, a.H / a.group, a.S, a.cu_seq_k != nullptr}; }
  __device__ static HeadPlace place(const AttentionArguments& a, const Rows& rows, int) {
    return {rows.batch, rows.head / a.group, a.before_keys(rows.batch)};
  }
  __device__ static int end(const Visibility& v) { return v.length; }
  template <class Block>
  __device__ static void copy_statistics(const AttentionArguments&, Block&, const Rows&, int, int, int, int, int) {}
};

// The next block that has any rows, for the `count` threads of role `number`; false after the last one.
template <class Cut>
__device__ inline bool next_block(HopperBlock<Cut>& block, int number, const AttentionArguments& a, int thread,
                                  int count) {
  auto& role = block.roles[number];
  ptx::barrier(of_role + number, count);  // nobody looks at the last one any more
  if (thread == 0) {
    do {
      ++role.round;
      role.more = role.index() < a.blocks;
      if (role.more) role.rows = typename Cut::Rows(a, Cut::block_rows, role.index());
    } while (role.more && role.rows.first >= role.rows.end);
    if (role.more) role.visibility = Visibility(a, role.rows.batch, role.rows.head);
    if (!role.more) role.round = -1;  // there may be a second pass
  }
  ptx::barrier(of_role + number, count);
  return role.more;
}

// Copies one operand of all tiles of one pass over all blocks. `uses` counts the stages filled.
//
// A tile takes longer to come than to be asked for, and about as long as the backward takes to use one up: so the next
// is asked for before this one is waited for. Only where there is no room for the next yet this one is waited for, and
// told of, at once: those who compute may need it to make room.
template <class Cut, bool Second, class Arguments>
__device__ inline void load_all(const Arguments& a, const TileMap& map, HopperBlock<Cut>& block, HopperTiles<Cut> tiles,
                                int& uses) {
  const auto& role = block.roles[Second];
  const Heads& from = Cut::streamed(a, Second);
  const auto thread = [] { return ptx::thread_now() % Cut::loaders; };
  const auto stages = [&]() -> auto& {
    if constexpr (Second) {
      return block.second;
    } else {
      return block.first;
    }
  };
  const auto tell = [&](int tile, int member) {
    if (Second || thread() != 0) return;
    block.tile[stages().of(uses)] = tile;
    block.member[stages().of(uses)] = member;
  };
  const auto ask = [&](const HeadPlace& head, int row, int end) {
    const auto to = Second ? tiles.second(uses) : tiles.first(uses);
    if (map.there && row + Cut::tile_rows <= end) {
      if (thread() == 0) stages().stage[stages().of(uses)].load_boxes(to, map, in_map(head, from), row);
    } else {
      const uint16_t* first = first_chunk(from, head.offset(from), thread());
      load_panels<Cut::loaders>(to, thread(), first, from.row, row, end, from.width);
    }
  };
  bool under_way = false;  // the tile asked for last
  const auto finish = [&] {
    if (!under_way) return;
    finish_copies();
    stages().tell_full(uses - 1);
    under_way = false;
  };
  while (next_block<Cut>(block, Second, a, thread(), Cut::loaders)) {
    Cut::template each_tile<Cut>(a, role.rows, role.visibility, [&](int member, int tile, bool partial) {
      const int row = tile * Cut::tile_rows, end = Cut::end(role.visibility);
      if (under_way && !stages().is_free(uses)) finish();
      stages().wait_until_free(uses);
      ask(Cut::place(a, role.rows, member), row, end);
      if (!Second) Cut::copy_statistics(a, block, role.rows, stages().of(uses), member, row, end, thread());
      tell(row + partial, member);
      ptx::commit_copies();
      if (under_way) {
        finish_copies<1>();
        stages().tell_full(uses - 1);
      }
      under_way = true;
      ++uses;
    });
    finish();
    if (Second) continue;
    stages().wait_until_free(uses);
    tell(-1, 0);
    stages().tell_full(uses++);
  }
}

template <class Cut, bool Second, class Arguments>
__device__ inline void load(const Arguments& a, const TileMap& map, HopperBlock<Cut>& block, HopperTiles<Cut> tiles) {
  int uses = 0;
#pragma unroll 1
  for (bool careful = false;; careful = true) {
    load_all<Cut, Second>(a, map, block, tiles, uses);
    ptx::barrier(of_all, Cut::threads);
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

// The warpgroups that compute take turns.
template <class Cut>
__device__ inline void wait_for_turn() {
  ptx::barrier(turn + group_now(), Cut::computing);
}
template <class Cut>
__device__ inline void give_turn() {
  ptx::arrive(turn + 1 - group_now(), Cut::computing);
}

// How many tiles a warpgroup is through with, of either operand.
struct HopperProgress {
  int first = 0, second = 0;
};

// The first of this warp's 16 rows.
template <class Cut>
__device__ inline int first_row(const HopperRole<typename Cut::Rows>& role) {
  return role.rows.first + Cut::rows_apart * group_now() + thread_of_group() / 32 * 16;
}

// Begins to copy this warpgroup's rows of a head; zeros from row `end` on.
template <class Cut>
__device__ inline void load_own(const Heads& from, int64_t head_offset, int first, int end,
                                Panels<Cut::rows, Cut::D> to) {
  const int thread = thread_of_group();
  load_panels<Cut::group>(to, thread, first_chunk(from, head_offset, thread), from.row,
                          first + Cut::rows_apart * group_now(), end, from.width);
}

// Sets to 0 what is not finite, before either warpgroup multiplies by it: the work of both.
template <class T, class Cut>
__device__ inline void clean_together(Panels<Cut::tile_rows, Cut::D> tile, uint32_t* spoilt) {
  const int thread = int(threadIdx.x) - 2 * Cut::loaders;
  ptx::barrier(of_computing, Cut::computing);  // nobody reads of the tile before any more
  if (spoilt != nullptr && thread < Cut::tile_rows / 32) spoilt[thread] = 0;
  ptx::barrier(of_computing, Cut::computing);
  clean_tile<T, Cut::tile_rows>(tile, spoilt, thread, Cut::computing);
  ptx::fence_async_proxy();
  ptx::barrier(of_computing, Cut::computing);
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

// Of the tensors that pass by.
struct StreamMaps {
  TileMap first, second;
};

// The roles of a kernel, of which `pass(block, tiles, careful, progress)` is what a warpgroup that computes does, over
// all blocks: a second time, with an operand cleaned, where block.unclean was set.
template <class Cut, class Arguments, class Pass>
__device__ inline void play_roles(const Arguments& a, const StreamMaps& maps, unsigned char* shared, const Pass& pass) {
  const HopperTiles<Cut> tiles{ptx::shared_address(shared)};
  auto& block = *reinterpret_cast<HopperBlock<Cut>*>(shared + Cut::tiles_bytes);
  if (threadIdx.x == 0) {
    for (auto& role : block.roles) role.round = -1;
    for (HopperStage& stage : block.first.stage) stage.make(Cut::loaders / 32, Cut::computing / 32);
    for (HopperStage& stage : block.second.stage) stage.make(Cut::loaders / 32, Cut::computing / 32);
    block.unclean = 0;
    ptx::fence_async_proxy();  // the copy engine is to find the barriers
  }
  __syncthreads();
  if (threadIdx.x < 2 * Cut::loaders) {
    ptx::leave_registers<Cut::loader_registers>();
    if (threadIdx.x < Cut::loaders) {
      load<Cut, false>(a, maps.first, block, tiles);
    } else {
      load<Cut, true>(a, maps.second, block, tiles);
    }
  } else {
    ptx::take_registers<Cut::group_registers>();
    HopperProgress progress;
    if (group_now() == 1) ptx::arrive(turn, Cut::computing);  // the first turn is that of the first
#pragma unroll 1
    for (bool careful = false;; careful = true) {
      pass(block, tiles, careful, progress);
      ptx::barrier(of_all, Cut::threads);
      if (careful || block.unclean == 0) break;
    }
    if (group_now() == 0) ptx::barrier(turn, Cut::computing);
  }
}

// Starts a kernel that plays roles, of which there are so many `blocks` of rows.
template <class Cut, class Arguments>
void start_roles(const char* name, const TensorView& of, void (*kernel)(Arguments, StreamMaps), Arguments a,
                 int64_t blocks, const Launch& launch) {
  a.blocks = int(blocks);
  const auto map = [&](bool second) { return tile_map(name, Cut::streamed(a, second), Cut::size(a), Cut::tile_rows); };
  const Shape shape{dim3(unsigned(std::min(a.blocks, multiprocessors()))), dim3(Cut::threads),
                    Cut::tiles_bytes + sizeof(HopperBlock<Cut>)};
  start(name, of, kernel, shape, launch, a, StreamMaps{map(false), map(true)});
}

// As by_head_width, for the widths whose panels are whole, up to WIDEST.
template <int WIDEST = 256, class Body>
void by_panels(const char* name, int64_t width, const Body& body) {
  if (width <= 64) return body(std::integral_constant<int, 64>());
  if (width <= 128) return body(std::integral_constant<int, 128>());
  if constexpr (WIDEST > 128) {
    if (width <= 192) return body(std::integral_constant<int, 192>());
    if (width <= 256) return body(std::integral_constant<int, 256>());
  }
  fail(name, ": head dims go up to ", WIDEST, ", got ", width);
}

}  // namespace pytransformer::cuda
