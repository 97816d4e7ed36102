// dK and dV by Hopper's own instructions for head dims beyond 128, where sums of both for the same keys would take all
// registers of a warpgroup. So two share the work, as two warps do in attention_bwd_key.cu: they have the same 64 keys,
// and each makes one product of two operands and one sum:
//
//     the first    S^T = K Q^T      P^T              dV += P^T dOut
//     the second   dP^T = V dOut^T  dS^T, by P^T     dK += dS^T Q
//
// What takes turns here (attention_hopper.cuh) is not who begins products, but who has the place in shared memory
// through which the weights go: the first when it writes them, the second when it reads them.
#include "attention_bwd_key_sm90.cuh"

namespace pytransformer::cuda {
namespace {

// Of the same rows, for both warpgroups.
template <int D>
using HopperWideTiles = HopperCut<QueriesPass, D, 32, 3, 3, 2, true>;

// Behind the tiles lie the weights on their way, of four pairs of warps.
template <int D>
struct HopperWideKey : HopperWideTiles<D> {
  using Weights = Exchange<1, HopperWideTiles<D>::tile_rows>;
  static constexpr int exchange_at = HopperWideTiles<D>::tiles_bytes, tiles_bytes = exchange_at + 4 * Weights::bytes;
};

// The sum of one warpgroup, in one block: of dV for the first, of dK for the second.
template <class T, int D>
__device__ inline void attend(float (&sum)[1][D / 8][4], const BackwardArguments& a,
                              HopperBlock<HopperWideKey<D>>& block, HopperTiles<HopperWideKey<D>> tiles, bool careful,
                              HopperProgress& progress) {
  using Cut = HopperWideKey<D>;
  constexpr int N = Cut::tile_rows;
  const auto is_first = [&] { return group_now() == 0; };
  const auto role = [&]() -> const auto& { return block.roles[2 + group_now()]; };
  const auto exchange = [&] {
    const int thread = thread_of_group();
    return
        typename Cut::Weights{tiles.memory + Cut::exchange_at + thread / 32 * Cut::Weights::bytes + thread % 32 * 16};
  };
  float x[1][N / 8][4];         // products, and then weights or their gradients
  uint32_t weights[N / 16][4];  // the same, rounded
  QueriesAtHand<Cut> at_hand{block, tiles, progress};
  const auto begin_scores = [&](int ahead) {
    block.second.wait_until_full(progress.second + ahead);
    ptx::begin_products();
    begin_products_of_rows<T, N>(x[0], tiles.own(0, group_now()),
                                 is_first() ? at_hand.queries(ahead) : at_hand.grad_outs(ahead));
    ptx::commit_products();
  };
  const auto begin_sum = [&] {
    ptx::held(weights);
    ptx::held(sum[0]);
    ptx::begin_products();
    begin_weighted_rows<T, N>(sum[0], weights, is_first() ? at_hand.grad_outs(0) : at_hand.queries(0));
    ptx::commit_products();
  };
  const auto sum_is_here = [&] {
    ptx::wait_for_products<0>();
    ptx::held(weights);
    ptx::held(sum[0]);
  };
  const auto to_operand = [&](int t, int ahead, const Asked& asked) {
    const auto& rows = role().rows;
    const int h = rows.head + at_hand.member;
    const int64_t line = (int64_t(rows.batch) * a.H + h) * a.T;
    float2 of_columns[N / 8];  // the lse for the first, delta for the second
    at_hand.template take_statistics<N>(of_columns, ahead, group_now());
    const RowsAreKeys<1, N> place{role().visibility, a, of_columns, line, first_row<Cut>(role()), t, at_hand.member};
    TileBits<1> bits;
    if (is_first()) {
      if (asked.anything()) bits = TileBits<1>(place, asked);
      score_weights<T, 1, N>(x, a, place, bits, asked, rows.batch * a.bias.batch + h * a.bias.head);
      wait_for_turn<Cut>();
      exchange().put(x);
      if (asked.hides || asked.drops) exchange().put(bits);
      give_turn<Cut>();
      if (asked.drops) keep<1, N>(x, bits.kept, a.dropout.scale);
    } else {
      float p[1][N / 8][4];
      wait_for_turn<Cut>();
      exchange().take(p);
      if (asked.hides || asked.drops) exchange().take(bits);
      give_turn<Cut>();
      score_gradients<1, N>(x, p, a.dropout, place, bits, asked);
      if (asked.shapes && a.softcap > 0) {  // the products of the scores once more
        ptx::held(p[0]);
        ptx::begin_products();
        begin_products_of_rows<T, N>(p[0], tiles.own(0, 0), at_hand.queries(ahead));
        ptx::commit_products();
        ptx::wait_for_products<0>();
        ptx::held(p[0]);
        cap_gradients<1, N>(x, p, a);
      }
    }
  };

  set_zero<1, D>(sum);
  int tile = at_hand.next_tile(0);
  if (tile < 0) return block.first.tell_free(progress.first++);
  if (careful && tile & 1) clean_together<T, Cut>(at_hand.queries(0), nullptr);
  begin_scores(0);
  ptx::wait_for_products<0>();
  ptx::held(x[0]);
  for (bool first = true;; first = false) {
    const Asked asked(a, tile & 1);
    asked.anything() ? to_operand(tile & ~1, first ? 0 : 1, asked) : to_operand(tile & ~1, first ? 0 : 1, {});
    sum_is_here();  // of the tile before
    if (!first) at_hand.release();
    round_weights<T, N>(weights, x[0]);
    tile = at_hand.next_tile(1);
    if (tile < 0) break;
    if (careful && tile & 1) clean_together<T, Cut>(at_hand.queries(1), nullptr);
    begin_scores(1);
    begin_sum();
    ptx::wait_for_products<1>();  // of the scores
    ptx::held(x[0]);
  }
  begin_sum();
  sum_is_here();
  at_hand.release();
  block.first.tell_free(progress.first++);  // where there were none
}

// One pass of a warpgroup over all blocks.
template <class T, int D>
__device__ inline void attend_all(const BackwardArguments& a, HopperBlock<HopperWideKey<D>>& block,
                                  HopperTiles<HopperWideKey<D>> tiles, bool careful, HopperProgress& progress) {
  using Cut = HopperWideKey<D>;
  const auto is_first = [&] { return group_now() == 0; };
  const auto role = [&]() -> const auto& { return block.roles[2 + group_now()]; };
  const auto own = [&] { return tiles.own(0, group_now()); };
  const auto offset = [&](const Heads& x) { return a.of_keys(x, role().rows.batch, role().rows.key_head); };
  while (next_block<Cut>(block, 2 + group_now(), a, thread_of_group(), Cut::group)) {
    const Heads& from = is_first() ? a.key : a.value;
    load_own<Cut>(from, offset(from), role().rows.first, role().visibility.length, own());
    ptx::commit_copies();
    finish_copies();
    ptx::barrier(of_computing, Cut::computing);  // the second may ask for the scores again: by the keys
    float sum[1][D / 8][4];
    attend<T, D>(sum, a, block, tiles, careful, progress);
    if (!is_first()) {
      if (has_nan<1, D>(sum)) atomicOr(&block.unclean, 1u);
      multiply_all<1, D>(sum, a.scale);
    }
    ptx::barrier(of_computing, Cut::computing);  // and has done so
    const Heads& to = is_first() ? a.grad_value : a.grad_key;
    store_rows<T, 1>(sum, own(), thread_of_group() / 32 * 16, to, offset(to), first_row<Cut>(role()), role().rows.end);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(HopperWideKey<D>::threads, 1)
    attention_bwd_wide_key_sm90_kernel(const __grid_constant__ BackwardArguments a,
                                       const __grid_constant__ StreamMaps maps) {
  extern __shared__ __align__(1024) unsigned char shared[];
  play_roles<HopperWideKey<D>>(a, maps, shared, [&](auto& block, auto tiles, bool careful, auto& progress) {
    attend_all<T, D>(a, block, tiles, careful, progress);
  });
}

}  // namespace

template <class T>
void attention_bwd_wide_key_sm90(const BackwardArguments& a, const TensorView& key, const Launch& launch) {
  const auto start = [&](auto width) {
    using Cut = HopperWideKey<width()>;
    const int64_t blocks = ceil_div(a.S, Cut::block_rows) * a.B * (a.H / a.group);
    start_roles<Cut>("attention_bwd: key", key, attention_bwd_wide_key_sm90_kernel<T, width()>, a, blocks, launch);
  };
  if (std::max(a.query.width, a.value.width) <= 192) return start(std::integral_constant<int, 192>());
  start(std::integral_constant<int, 256>());
}

template void attention_bwd_wide_key_sm90<__half>(const BackwardArguments&, const TensorView&, const Launch&);
template void attention_bwd_wide_key_sm90<__nv_bfloat16>(const BackwardArguments&, const TensorView&, const Launch&);

}  // namespace pytransformer::cuda
