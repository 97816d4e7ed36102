// Masked softmax attention, forward, by Hopper's own instructions: products of whole warpgroups (warpgroup.cuh), which
// run beside the threads that began them. What it computes is what attention_fwd_sm80.cuh does, by other means.
//
// On Hopper mma.sync reaches two thirds of the tensor cores' rate, and leaves them idle while a warp is at its softmax.
// Here neither need be: a product takes its operands from shared memory by itself, so that one warpgroup's products and
// another's exponentials share a scheduler.
//
// Who copies keys and values, and how it is handed on, stands in attention_hopper.cuh. A warpgroup that computes goes
// through a tile in this order (Shah et al., "FlashAttention-3", 2024, sec. 3):
//
//     begin  the scores of tile i + 1, and behind them the weighted values of tile i
//     wait   for the scores; the keys' stage is free. Their softmax, while tensor cores are at the values
//     wait   for the values; their stage is free. Rescale the total, where a larger score has turned up, round weights
//
// and the two take turns at the first step, so that one is at its softmax while the other's products run.
//
// Tiles are cut, masked and skipped as there: registers hold scores just as mma.sync leaves them, so the same functions
// see to masks, bias and dropout. A NaN in a result likewise has values cleaned in a second pass, here over all blocks
// of the multiprocessor: whoever copies is far ahead by the time that one is found.
//
// Sources: as there; Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision",
// 2024; PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include "attention_fwd.cuh"
#include "attention_hopper.cuh"

namespace pytransformer::cuda {

// As many keys as leave registers for D sums of a row.
constexpr int hopper_forward_keys(int D) {
  return D <= 128 ? 128 : D <= 192 ? 64 : 32;
}
template <int D>
using HopperForward = HopperCut<KeysPass, D, hopper_forward_keys(D), 2, 2, 1>;

// The queries of one warpgroup, in one block: results in `softmax`.
template <class T, int D>
__device__ inline void attend(RunningSoftmax<1, D>& softmax, const ForwardArguments& a,
                              HopperBlock<HopperForward<D>>& block, HopperTiles<HopperForward<D>> tiles, bool careful,
                              HopperProgress& progress) {
  using Cut = HopperForward<D>;
  constexpr int N = Cut::tile_rows;
  const auto role = [&]() -> const auto& { return block.roles[2 + group_now()]; };
  const auto row = [&] { return first_row<Cut>(role()) + thread_of_group() % 32 / 4; };
  float x[1][N / 8][4];         // scores, and then weights relative to the largest score
  uint32_t weights[N / 16][4];  // the same, rounded
  float (&total)[D / 8][4] = softmax.total[0];
  const auto next_tile = [&] {
    block.first.wait_until_full(progress.first);
    return block.tile[block.first.of(progress.first)];
  };
  const auto release_keys = [&] { block.first.tell_free(progress.first++); };
  const auto begin_scores = [&] {
    ptx::begin_products();
    begin_products_of_rows<T, N>(x[0], tiles.own(group_now()), tiles.first(progress.first));
    ptx::commit_products();
  };
  const auto wait_for_values = [&] { block.second.wait_until_full(progress.second); };
  const auto begin_total = [&] {
    if (!careful) wait_for_values();
    ptx::held(weights);
    ptx::held(total);
    ptx::begin_products();
    begin_weighted_rows<T, N>(total, weights, tiles.second(progress.second));
    ptx::commit_products();
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
      if (careful) clean_together<T, Cut>(tiles.second(progress.second), block.spoilt);
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
    if (!first) block.second.tell_free(progress.second - 1);
    if (raised) softmax.multiply_total(rescale);
    if (seeing != 0) softmax.spoil(seeing);
    round_weights<T, N>(weights, x[0]);
    tile = next_tile();
    if (tile < 0) break;
    wait_for_turn<Cut>();
    begin_scores();
    begin_total();
    give_turn<Cut>();
    ptx::wait_for_products<1>();  // of the scores
    ptx::held(x[0]);
    release_keys();
    ++progress.second;
  }
  release_keys();
  begin_total();
  ptx::wait_for_products<0>();
  ptx::held(total);
  block.second.tell_free(progress.second++);
}

// Writes what a warpgroup has found, by way of where its queries were.
template <class T, int D>
__device__ inline void store_results(RunningSoftmax<1, D>& softmax, const ForwardArguments& a,
                                     const BlockRows<false>& rows, int first, Panels<64, D> queries) {
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
__device__ inline void attend_all(const ForwardArguments& a, HopperBlock<HopperForward<D>>& block,
                                  HopperTiles<HopperForward<D>> tiles, bool careful, HopperProgress& progress) {
  using Cut = HopperForward<D>;
  while (next_block<Cut>(block, 2 + group_now(), a, thread_of_group(), Cut::group)) {
    const BlockRows<false>& rows = block.roles[2 + group_now()].rows;
    const int64_t offset = a.of_queries(a.query, rows.batch, rows.head);
    load_own<Cut>(a.query, offset, rows.first, rows.end, tiles.own(group_now()));
    ptx::commit_copies();
    finish_copies();
    ptx::barrier(of_role + 2 + group_now(), Cut::group);
    RunningSoftmax<1, D> softmax;
    attend<T, D>(softmax, a, block, tiles, careful, progress);
    if (has_nan<1, D>(softmax.total)) atomicOr(&block.unclean, 1u);
    const auto& role = block.roles[2 + group_now()];
    store_results<T, D>(softmax, a, role.rows, first_row<Cut>(role), tiles.own(group_now()));
  }
}

template <class T, int D>
__global__ void __launch_bounds__(HopperForward<D>::threads, 1)
    attention_fwd_sm90_kernel(const __grid_constant__ ForwardArguments a, const __grid_constant__ StreamMaps maps) {
  extern __shared__ __align__(1024) unsigned char shared[];
  play_roles<HopperForward<D>>(a, maps, shared, [&](auto& block, auto tiles, bool careful, auto& progress) {
    attend_all<T, D>(a, block, tiles, careful, progress);
  });
}

}  // namespace pytransformer::cuda
