// dQ, and the gradient of the bias, by Hopper's own instructions: the roles of attention_hopper.cuh, the loop of
// attention_fwd_sm90.cuh, and what attention_bwd.cuh says of the products in between.
//
// A tile's keys are read by two products: of the scores, and, once dS is known, for dQ. While the second runs, the
// scores and dP of the next tile are made, so that three stages of keys are in use.
#include "attention_bwd.cuh"
#include "attention_hopper.cuh"

namespace pytransformer::cuda {
namespace {

template <int D>
using HopperQuery = HopperCut<KeysPass, D, D <= 128 ? 64 : 32, 3, 2, 2>;

// The queries of one warpgroup, in one block.
template <class T, int D>
__device__ inline void attend(float (&sum)[1][D / 8][4], const BackwardArguments& a, HopperBlock<HopperQuery<D>>& block,
                              HopperTiles<HopperQuery<D>> tiles, bool careful, HopperProgress& progress) {
  using Cut = HopperQuery<D>;
  constexpr int N = Cut::tile_rows;
  const auto role = [&]() -> const auto& { return block.roles[2 + group_now()]; };
  const auto row = [&] { return first_row<Cut>(role()) + thread_of_group() % 32 / 4; };
  float p[1][N / 8][4], ds[1][N / 8][4];  // products, and then weights and gradients
  uint32_t weights[N / 16][4];            // of keys, for dQ: dS, rounded

  // Of the tile `ahead` of that whose keys are next to be freed.
  const auto keys = [&](int ahead) { return tiles.first(progress.first + ahead); };
  const auto next_tile = [&](int ahead) {
    block.first.wait_until_full(progress.first + ahead);
    return block.tile[block.first.of(progress.first + ahead)];
  };
  const auto release_keys = [&] { block.first.tell_free(progress.first++); };
  const auto begin_scores = [&](int ahead) {
    block.second.wait_until_full(progress.second);
    ptx::begin_products();
    begin_products_of_rows<T, N>(p[0], tiles.own(group_now()), keys(ahead));
    begin_products_of_rows<T, N>(ds[0], tiles.own(group_now(), 1), tiles.second(progress.second));
    ptx::commit_products();
  };
  const auto scores_are_here = [&] {
    ptx::held(p[0]);
    ptx::held(ds[0]);
    block.second.tell_free(progress.second++);
  };
  const auto begin_sum = [&] {
    ptx::held(weights);
    ptx::held(sum[0]);
    ptx::begin_products();
    begin_weighted_rows<T, N>(sum[0], weights, keys(0));
    ptx::commit_products();
  };
  const auto to_gradients = [&](int s, const Asked& asked) {
    const BlockRows<false>& rows = role().rows;
    const float2* of_row = block.of_rows + (row() - rows.first);
    const float2 of_rows[1][2] = {{of_row[0], of_row[8]}};
    const int64_t line = (int64_t(rows.batch) * a.H + rows.head) * a.T;
    const RowsAreQueries<1, N> place{role().visibility, a, of_rows, line, row(), s};
    TileBits<1> bits;
    if (asked.anything()) bits = TileBits<1>(place, asked);
    score_weights<T, 1, N>(p, a, place, bits, asked, rows.batch * a.bias.batch + rows.head * a.bias.head);
    score_gradients<1, N>(ds, p, a.dropout, place, bits, asked);
    if (asked.shapes && a.grad_bias != nullptr) store_grad_bias<1, N>(ds, place, a.grad_bias + line * a.S);
  };

  set_zero<1, D>(sum);
  int tile = next_tile(0);
  if (tile < 0) return release_keys();
  if (careful && tile & 1) clean_together<T, Cut>(keys(0), nullptr);
  begin_scores(0);
  ptx::wait_for_products<0>();
  scores_are_here();
  for (bool first = true;; first = false) {
    const Asked asked(a, tile & 1);
    asked.anything() ? to_gradients(tile & ~1, asked) : to_gradients(tile & ~1, {});
    const bool caps = asked.shapes && a.softcap > 0;
    if (caps) {  // the products once more: P has been used
      ptx::held(p[0]);
      ptx::begin_products();
      begin_products_of_rows<T, N>(p[0], tiles.own(group_now()), keys(first ? 0 : 1));
      ptx::commit_products();
    }
    ptx::wait_for_products<0>();  // of the tile before
    ptx::held(sum[0]);
    ptx::held(weights);
    ptx::held(p[0]);
    if (!first) release_keys();
    if (caps) cap_gradients<1, N>(ds, p, a);
    round_weights<T, N>(weights, ds[0]);
    tile = next_tile(1);
    if (tile < 0) break;
    if (careful && tile & 1) clean_together<T, Cut>(keys(1), nullptr);
    wait_for_turn<Cut>();
    begin_scores(1);
    begin_sum();
    give_turn<Cut>();
    ptx::wait_for_products<1>();  // of the scores
    scores_are_here();
  }
  begin_sum();
  ptx::wait_for_products<0>();
  ptx::held(sum[0]);
  release_keys();
  release_keys();  // where there were none
}

// The lse and delta of the queries of this warpgroup.
__device__ inline void load_statistics(const BackwardArguments& a, const BlockRows<false>& rows, float2* to) {
  const int thread = thread_of_group(), i = 64 * group_now() + thread;
  if (thread >= 64) return;
  const int64_t at = a.of_rows(rows.batch, rows.head) + rows.first + i;
  to[i] = rows.first + i < rows.end ? float2{a.lse_in_log2[at], a.delta[at]} : float2{0, 0};
}

// One pass of a warpgroup over all blocks.
template <class T, int D>
__device__ inline void attend_all(const BackwardArguments& a, HopperBlock<HopperQuery<D>>& block,
                                  HopperTiles<HopperQuery<D>> tiles, bool careful, HopperProgress& progress) {
  using Cut = HopperQuery<D>;
  while (next_block<Cut>(block, 2 + group_now(), a, thread_of_group(), Cut::group)) {
    const BlockRows<false>& rows = block.roles[2 + group_now()].rows;
    const auto load = [&](const Heads& x, int which) {
      const int64_t offset = a.of_queries(x, rows.batch, rows.head);
      load_own<Cut>(x, offset, rows.first, rows.end, tiles.own(group_now(), which));
    };
    load(a.query, 0);
    load(a.grad_out, 1);
    load_statistics(a, rows, block.of_rows);
    ptx::commit_copies();
    finish_copies();
    ptx::barrier(of_role + 2 + group_now(), Cut::group);
    float sum[1][D / 8][4];
    attend<T, D>(sum, a, block, tiles, careful, progress);
    if (has_nan<1, D>(sum)) atomicOr(&block.unclean, 1u);
    multiply_all<1, D>(sum, a.scale);
    const auto& role = block.roles[2 + group_now()];
    const int64_t offset = a.of_queries(a.grad_query, role.rows.batch, role.rows.head);
    store_rows<T, 1>(sum, tiles.own(group_now()), thread_of_group() / 32 * 16, a.grad_query, offset,
                     first_row<Cut>(role), role.rows.end);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(HopperQuery<D>::threads, 1)
    attention_bwd_query_sm90_kernel(const __grid_constant__ BackwardArguments a,
                                    const __grid_constant__ StreamMaps maps) {
  extern __shared__ __align__(1024) unsigned char shared[];
  play_roles<HopperQuery<D>>(a, maps, shared, [&](auto& block, auto tiles, bool careful, auto& progress) {
    attend_all<T, D>(a, block, tiles, careful, progress);
  });
}

}  // namespace

template <class T>
void attention_bwd_query_sm90(const BackwardArguments& a, const TensorView& query, const Launch& launch) {
  by_panels("attention_bwd", std::max(a.query.width, a.value.width), [&](auto width) {
    using Cut = HopperQuery<width()>;
    const int64_t blocks = ceil_div(a.T, Cut::block_rows) * a.B * a.H;
    start_roles<Cut>("attention_bwd: query", query, attention_bwd_query_sm90_kernel<T, width()>, a, blocks, launch);
  });
}

template void attention_bwd_query_sm90<__half>(const BackwardArguments&, const TensorView&, const Launch&);
template void attention_bwd_query_sm90<__nv_bfloat16>(const BackwardArguments&, const TensorView&, const Launch&);

}  // namespace pytransformer::cuda
