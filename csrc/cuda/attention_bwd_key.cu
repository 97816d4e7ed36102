// dK and dV: a block owns 16 M keys for each pair of warps and walks over the queries of all heads that share them,
// head after head (attention_bwd.cuh). Tiles of scores are transposed.
//
// Sums of dK and of dV for the same keys would take all registers of a warp, so a pair shares the work. Each of the two
// makes one product of two operands and one sum:
//
//     the first    S^T = K Q^T      P^T              dV += P^T dOut
//     the second   dP^T = V dOut^T  dS^T, by P^T     dK += dS^T Q
//
// What goes from one to the other, by way of shared memory, is the weights, in float32 and in the order in which lanes
// hold them. With M = 2 a fragment that comes from shared memory serves two products.
#include <algorithm>

#include "attention_bwd.cuh"

namespace pytransformer::cuda {
namespace {

constexpr int pairs = warps / 2;

template <int D>
struct KeyCut {
  static constexpr int M = D <= 128 ? 2 : 1;
  static constexpr int keys = 16 * M * pairs;
  static constexpr int queries = D <= 128 ? 32 : 16;
  static constexpr int blocks = D <= 64 ? 3 : 2;  // of a multiprocessor, which leaves so many registers
  static constexpr int stages = 2;
  static constexpr int statistics_bytes = 2 * queries * int(sizeof(float));  // of a stage
  static constexpr int exchange_bytes = Exchange<M, queries>::bytes;         // of a pair
  static constexpr int block_at =
      tile_bytes<D>(2 * keys + 2 * stages * queries) + stages * statistics_bytes + pairs * exchange_bytes;
};

// The keys of a block. In shared memory.
struct KeyBlock {
  Visibility visibility;
  int64_t of_rows;  // of the lse
  KeyRows rows;

  KeyBlock() = default;
  __device__ KeyBlock(const BackwardArguments& a, int keys, int index) : rows(a, keys, index) {
    of_rows = a.of_rows(rows.batch, rows.head);
    visibility = Visibility(a, rows.batch, rows.head);
  }
};

// A tile of queries of one of the heads.
struct Step {
  int member, tile;
};

template <class T, int D>
__global__ void __launch_bounds__(threads, KeyCut<D>::blocks)
    attention_bwd_key_kernel(const __grid_constant__ BackwardArguments a) {
  using Cut = KeyCut<D>;
  constexpr int M = Cut::M, N = Cut::queries;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t memory = ptx::shared_address(shared);
  const auto tile_at = [&](int row) { return Tile<D>{memory + tile_bytes<D>(row)}; };
  const Tile<D> keys = tile_at(0), values = tile_at(Cut::keys);
  const auto buffer = [&](int i) { return tile_at(2 * Cut::keys + i * N); };
  const uint32_t of_statistics = memory + tile_bytes<D>(2 * Cut::keys + 2 * Cut::stages * N);
  const int pair = warp() / 2;
  const bool is_first = warp() % 2 == 0;
  const Exchange<M, N> exchange{of_statistics + Cut::stages * Cut::statistics_bytes + pair * Cut::exchange_bytes +
                                16 * lane()};

  auto& block = *reinterpret_cast<KeyBlock*>(shared + Cut::block_at);
  const Visibility& v = block.visibility;
  if (threadIdx.x == 0) block = KeyBlock(a, Cut::keys, int(blockIdx.x));
  __syncthreads();
  if (a.cu_seq_k != nullptr && block.rows.first >= v.length) return;  // of a sequence that is shorter than the longest
  const Range range = query_tiles<N, Cut::keys>(v, block.rows.first);
  TileKind kind = TileKind::empty;  // of the step found last
  const auto find = [&](Step step) {
    for (; step.member < a.group; step = {step.member + 1, range.tile}) {
      for (; step.tile < range.end; ++step.tile) {
        const int t = step.tile * N;
        kind = tile_kind<N, Cut::keys>(a, v, range.inside(step.tile), t, block.rows.first, step.member);
        if (kind != TileKind::empty) return step;
      }
    }
    return step;
  };
  const HeadRows<N, D> of_queries(a.query, a.of_queries(a.query, block.rows.batch, block.rows.head));
  const HeadRows<N, D> of_grad_outs(a.grad_out, a.of_queries(a.grad_out, block.rows.batch, block.rows.head));
  // Queries of a step and what goes with them, or zeros where there is none.
  const auto load = [&](Step step, int stage) {
    const TileCopy<D> copy;
    const int t = step.tile * N, end = step.member < a.group ? v.T : 0;
    of_queries.load(copy, buffer(2 * stage), t, end, step.member * a.query.head);
    of_grad_outs.load(copy, buffer(2 * stage + 1), t, end, step.member * a.grad_out.head);
    static_assert(2 * N <= threads);
    const int i = ptx::thread_now(), row = t + i % N;
    const float* from = (i < N ? a.lse_in_log2 : a.delta) + block.of_rows + step.member * a.lse_head + row;
    if (i < 2 * N) ptx::copy_4_async(of_statistics + stage * Cut::statistics_bytes + 4 * i, from, row < end);
    ptx::commit_copies();
  };
  const auto of_keys = [&](const Heads& x) { return a.of_keys(x, block.rows.batch, block.rows.key_head); };
  HeadRows<Cut::keys, D>(a.key, of_keys(a.key)).load({}, keys, block.rows.first, v.length);
  HeadRows<Cut::keys, D>(a.value, of_keys(a.value)).load({}, values, block.rows.first, v.length);

  const int of_pair = 16 * M * pair;
  float sum[M][D / 8][4];  // of dV or dK
#pragma unroll 1
  for (bool careful = false;; careful = true) {
    set_zero<M, D>(sum);
    Step step = find({0, range.tile});
    load(step, 0);
    for (int stage = 0; step.member < a.group; stage ^= 1) {
      const bool partial = kind == TileKind::partial;
      const Step next = find({step.member, step.tile + 1});
      ptx::wait_for_copies<0>();
      __syncthreads();  // this tile is here, and nobody reads the other buffer any more
      const Tile<D> queries = buffer(2 * stage), grad_outs = buffer(2 * stage + 1);
      if (careful && partial) {
        clean_tile<T, N>(queries, nullptr);
        __syncthreads();
      }
      const int h = block.rows.head + step.member;
      float2 of_columns[N / 8];  // the lse for the first of a pair, delta for the second
      const int64_t line = (int64_t(block.rows.batch) * a.H + h) * a.T;
      const RowsAreKeys<M, N> place{v, a, of_columns, line, block.rows.first + of_pair, step.tile * N, step.member};
      const Asked asked(a, partial);
      TileBits<M> bits;
      if (is_first && asked.anything()) bits = TileBits<M>(place, asked);
      float x[M][N / 8][4] = {};
      const RowsInTile<M, D> rows(is_first ? keys : values, of_pair);
      multiply_rows<T, M, N>(x, rows, is_first ? queries : grad_outs);
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        const uint32_t of_stage = of_statistics + stage * Cut::statistics_bytes + (is_first ? 0 : 4 * N);
        of_columns[n] = ptx::load_shared_8(of_stage + 4 * (8 * n + lane_column()));
      }
      load(next, stage ^ 1);  // while tensor cores are busy
      const auto to_weights = [&](const Asked& asked) {
        score_weights<T, M, N>(x, a, place, bits, asked, block.rows.batch * a.bias.batch + h * a.bias.head);
        exchange.put(x);  // of the last tile nobody takes any more: all have met since
        if (asked.hides || asked.drops) exchange.put(bits);
        ptx::arrive(1 + pair, 64);
        if (asked.drops) keep<M, N>(x, bits.kept, a.dropout.scale);
      };
      const auto to_gradients = [&](const Asked& asked) {
        ptx::barrier(1 + pair, 64);
        float weights[M][N / 8][4];
        exchange.take(weights);
        if (asked.hides || asked.drops) exchange.take(bits);
        score_gradients<M, N>(x, weights, a.dropout, place, bits, asked);
        if (asked.shapes && a.softcap > 0) {
          float products[M][N / 8][4] = {};
          multiply_rows<T, M, N>(products, RowsInTile<M, D>(keys, of_pair), queries);
          cap_gradients<M, N>(x, products, a);
        }
      };
      const auto to_operand = [&](const Asked& asked) { is_first ? to_weights(asked) : to_gradients(asked); };
      asked.anything() ? to_operand(asked) : to_operand({});
      multiply_weights<T, M, N>(sum, x, is_first ? grad_outs : queries);
      step = next;
    }
    ptx::wait_for_copies<0>();  // of the operands that stay, where no tile was visited
    if (!__syncthreads_or(!is_first && has_nan<M, D>(sum)) || careful) break;
  }
  const int first = block.rows.first + of_pair, end = block.rows.end;
  if (is_first) {
    store_rows<T, M>(sum, values, of_pair, a.grad_value, of_keys(a.grad_value), first, end);
  } else {
    multiply_all<M, D>(sum, a.scale);
    store_rows<T, M>(sum, keys, of_pair, a.grad_key, of_keys(a.grad_key), first, end);
  }
}

}  // namespace

template <class T>
void attention_bwd_key(const BackwardArguments& a, const TensorView& key, const Launch& launch) {
  const int widest = std::max(a.query.width, a.value.width);
  if constexpr (hopper_built) {
    if (hopper_serves(widest)) {
      return widest <= 128 ? attention_bwd_key_sm90<T>(a, key, launch) : attention_bwd_wide_key_sm90<T>(a, key, launch);
    }
  }
  by_head_width("attention_bwd", widest, [&](auto width) {
    using Cut = KeyCut<width()>;
    const int64_t blocks = ceil_div(a.S, Cut::keys) * a.B * (a.H / a.group);
    start("attention_bwd: key", key, attention_bwd_key_kernel<T, width()>,
          Shape{dim3(unsigned(blocks)), dim3(threads), Cut::block_at + sizeof(KeyBlock)}, launch, a);
  });
}

template void attention_bwd_key<__half>(const BackwardArguments&, const TensorView&, const Launch&);
template void attention_bwd_key<__nv_bfloat16>(const BackwardArguments&, const TensorView&, const Launch&);

}  // namespace pytransformer::cuda
