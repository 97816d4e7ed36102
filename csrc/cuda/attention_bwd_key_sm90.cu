// dK and dV by Hopper's own instructions: the roles of attention_hopper.cuh with tiles of queries that pass by blocks
// of keys, the queries of all heads that share them, head after head. Tiles of scores are transposed
// (attention_bwd.cuh).
//
//     S^T = K Q^T,  dP^T = V dOut^T    both operands in shared memory
//     dV += P^T dOut,  dK += dS^T Q    weights in registers
//
// A warpgroup has 64 keys and sums both for them, which up to 128 columns registers hold: 2 D / 2 of a thread. While
// the sums take in one tile, the scores of the next are made; so a tile's operands are read twice, and three stages are
// in use.
#include "attention_bwd_key_sm90.cuh"

namespace pytransformer::cuda {
namespace {

template <int D>
using HopperKey = HopperCut<QueriesPass, D, D <= 64 ? 64 : 32, 3, 3, 2>;

// The keys of one warpgroup, in one block.
template <class T, int D>
__device__ inline void attend(float (&grad_key)[1][D / 8][4], float (&grad_value)[1][D / 8][4],
                              const BackwardArguments& a, HopperBlock<HopperKey<D>>& block,
                              HopperTiles<HopperKey<D>> tiles, bool careful, HopperProgress& progress) {
  using Cut = HopperKey<D>;
  constexpr int N = Cut::tile_rows;
  const auto role = [&]() -> const auto& { return block.roles[2 + group_now()]; };
  float p[1][N / 8][4], ds[1][N / 8][4];              // products, and then weights and gradients
  uint32_t for_value[N / 16][4], for_key[N / 16][4];  // the same, rounded
  QueriesAtHand<Cut> at_hand{block, tiles, progress};
  const auto begin_scores = [&](int ahead) {
    block.second.wait_until_full(progress.second + ahead);
    ptx::begin_products();
    begin_products_of_rows<T, N>(p[0], tiles.own(group_now()), at_hand.queries(ahead));
    begin_products_of_rows<T, N>(ds[0], tiles.own(group_now(), 1), at_hand.grad_outs(ahead));
    ptx::commit_products();
  };
  const auto begin_sums = [&] {
    ptx::held(for_value);
    ptx::held(for_key);
    ptx::held(grad_value[0]);
    ptx::held(grad_key[0]);
    ptx::begin_products();
    begin_weighted_rows<T, N>(grad_value[0], for_value, at_hand.grad_outs(0));
    begin_weighted_rows<T, N>(grad_key[0], for_key, at_hand.queries(0));
    ptx::commit_products();
  };
  const auto sums_are_here = [&] {
    ptx::wait_for_products<0>();
    ptx::held(for_value);
    ptx::held(for_key);
    ptx::held(grad_value[0]);
    ptx::held(grad_key[0]);
  };
  const auto to_gradients = [&](int t, int ahead, const Asked& asked) {
    const auto& rows = role().rows;
    const int h = rows.head + at_hand.member;
    const int64_t line = (int64_t(rows.batch) * a.H + h) * a.T;
    float2 of_columns[N / 8];
    const RowsAreKeys<1, N> place{role().visibility, a, of_columns, line, first_row<Cut>(role()), t, at_hand.member};
    TileBits<1> bits;
    if (asked.anything()) bits = TileBits<1>(place, asked);
    at_hand.template take_statistics<N>(of_columns, ahead, 0);
    score_weights<T, 1, N>(p, a, place, bits, asked, rows.batch * a.bias.batch + h * a.bias.head);
    at_hand.template take_statistics<N>(of_columns, ahead, 1);
    score_gradients<1, N>(ds, p, a.dropout, place, bits, asked);
    if (asked.drops) keep<1, N>(p, bits.kept, a.dropout.scale);
  };

  set_zero<1, D>(grad_key);
  set_zero<1, D>(grad_value);
  int tile = at_hand.next_tile(0);
  if (tile < 0) return block.first.tell_free(progress.first++);
  if (careful && tile & 1) clean_together<T, Cut>(at_hand.queries(0), nullptr);
  begin_scores(0);
  ptx::wait_for_products<0>();
  ptx::held(p[0]);
  ptx::held(ds[0]);
  for (bool first = true;; first = false) {
    const Asked asked(a, tile & 1);
    asked.anything() ? to_gradients(tile & ~1, first ? 0 : 1, asked) : to_gradients(tile & ~1, first ? 0 : 1, {});
    sums_are_here();  // of the tile before
    if (!first) at_hand.release();
    round_weights<T, N>(for_value, p[0]);
    if (asked.shapes && a.softcap > 0) {  // the products once more
      ptx::held(p[0]);
      ptx::begin_products();
      begin_products_of_rows<T, N>(p[0], tiles.own(group_now()), at_hand.queries(0));
      ptx::commit_products();
      ptx::wait_for_products<0>();
      ptx::held(p[0]);
      cap_gradients<1, N>(ds, p, a);
    }
    round_weights<T, N>(for_key, ds[0]);
    tile = at_hand.next_tile(1);
    if (tile < 0) break;
    if (careful && tile & 1) clean_together<T, Cut>(at_hand.queries(1), nullptr);
    wait_for_turn<Cut>();
    begin_scores(1);
    begin_sums();
    give_turn<Cut>();
    ptx::wait_for_products<1>();  // of the scores
    ptx::held(p[0]);
    ptx::held(ds[0]);
  }
  begin_sums();
  sums_are_here();
  at_hand.release();
  block.first.tell_free(progress.first++);  // where there were none
}

// One pass of a warpgroup over all blocks.
template <class T, int D>
__device__ inline void attend_all(const BackwardArguments& a, HopperBlock<HopperKey<D>>& block,
                                  HopperTiles<HopperKey<D>> tiles, bool careful, HopperProgress& progress) {
  using Cut = HopperKey<D>;
  while (next_block<Cut>(block, 2 + group_now(), a, thread_of_group(), Cut::group)) {
    const auto load = [&](const Heads& x, int which) {
      const auto& role = block.roles[2 + group_now()];
      const int64_t offset = a.of_keys(x, role.rows.batch, role.rows.key_head);
      load_own<Cut>(x, offset, role.rows.first, role.visibility.length, tiles.own(group_now(), which));
    };
    load(a.key, 0);
    load(a.value, 1);
    ptx::commit_copies();
    finish_copies();
    ptx::barrier(of_role + 2 + group_now(), Cut::group);
    float grad_key[1][D / 8][4], grad_value[1][D / 8][4];
    attend<T, D>(grad_key, grad_value, a, block, tiles, careful, progress);
    if (has_nan<1, D>(grad_key)) atomicOr(&block.unclean, 1u);
    multiply_all<1, D>(grad_key, a.scale);
    const auto store = [&](const float (&sum)[1][D / 8][4], const Heads& to, int which) {
      const auto& role = block.roles[2 + group_now()];
      const int64_t offset = a.of_keys(to, role.rows.batch, role.rows.key_head);
      store_rows<T, 1>(sum, tiles.own(group_now(), which), thread_of_group() / 32 * 16, to, offset,
                       first_row<Cut>(role), role.rows.end);
    };
    store(grad_key, a.grad_key, 0);
    store(grad_value, a.grad_value, 1);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(HopperKey<D>::threads, 1)
    attention_bwd_key_sm90_kernel(const __grid_constant__ BackwardArguments a,
                                  const __grid_constant__ StreamMaps maps) {
  extern __shared__ __align__(1024) unsigned char shared[];
  play_roles<HopperKey<D>>(a, maps, shared, [&](auto& block, auto tiles, bool careful, auto& progress) {
    attend_all<T, D>(a, block, tiles, careful, progress);
  });
}

}  // namespace

template <class T>
void attention_bwd_key_sm90(const BackwardArguments& a, const TensorView& key, const Launch& launch) {
  by_panels<128>("attention_bwd", std::max(a.query.width, a.value.width), [&](auto width) {
    using Cut = HopperKey<width()>;
    const int64_t blocks = ceil_div(a.S, Cut::block_rows) * a.B * (a.H / a.group);
    start_roles<Cut>("attention_bwd: key", key, attention_bwd_key_sm90_kernel<T, width()>, a, blocks, launch);
  });
}

template void attention_bwd_key_sm90<__half>(const BackwardArguments&, const TensorView&, const Launch&);
template void attention_bwd_key_sm90<__nv_bfloat16>(const BackwardArguments&, const TensorView&, const Launch&);

}  // namespace pytransformer::cuda
