// Attention of few queries over many keys (decoding with a cache): the keys are split among blocks.
//
// With one query a head there are only B x H blocks of the forward kernel, too few to draw a GPU's bandwidth, and each
// would read keys and values that the query heads of a group share. Here a block takes all queries of a group as the
// rows of one tile, over one share of the keys (the forward kernel, Grouped); a second kernel weighs the shares'
// outputs by exp(lse of the share - lse of all). How many shares there are depends on the shapes alone, not on the GPU
// and what else it does, and they are added up in order: the same bits in every run, on every machine.
//
// Keys and values in pages always come here, in as many shares as their table may hold keys for.
//
// Source: Dao et al., "Flash-Decoding for long-context inference", 2023; Kwon et al., "PagedAttention", 2023, sec. 4.1.
#include <algorithm>

#include "attention_fwd_sm80.cuh"

namespace pytransformer::cuda {
namespace {

constexpr const char* name = "attention_decode";
constexpr int64_t largest_tile = 64;  // rows; beyond, the forward kernel has work enough
static_assert(most_paged_rows <= largest_tile);
constexpr int64_t shortest_share = 256;  // keys; each costs a row of float32 output
constexpr int64_t one_round = 264;       // blocks: two for each multiprocessor of the largest GPUs, all at once
constexpr int64_t many_rounds = 2112;    // or so many that it matters little how full the last round is,
constexpr int64_t long_share = 512;      // if so many keys are left to each; between the two much of a GPU would idle
constexpr int64_t most_splits = 128;

struct CombineArguments {
  const float *parts, *parts_lse;  // [splits,B,H,T,Dv], [splits,B,H,T]
  Heads out;
  float* lse;
  int64_t rows;
  int H, T, splits;
};

// A block puts one row together.
template <class T>
__global__ void __launch_bounds__(threads) attention_combine_kernel(const __grid_constant__ CombineArguments a) {
  const int64_t row = blockIdx.x, t = row % a.T, head = row / a.T % a.H, batch = row / a.T / a.H;
  float largest = -infinity, sum = 0;
  for (int i = 0; i < a.splits; ++i) largest = fmaxf(largest, a.parts_lse[i * a.rows + row]);
  const float pivot = largest == -infinity ? 0.0f : largest;
  for (int i = 0; i < a.splits; ++i) sum += ptx::exp2((a.parts_lse[i * a.rows + row] - pivot) * log2_e);
  const float inverse = sum == 0 ? 0.0f : 1 / sum;
  T* out = static_cast<T*>(a.out.data) + batch * a.out.batch + head * a.out.head + t * a.out.row;
  for (int column = threadIdx.x; column < a.out.width; column += threads) {
    float total = 0;
    for (int i = 0; i < a.splits; ++i) {
      const float weight = ptx::exp2((a.parts_lse[i * a.rows + row] - pivot) * log2_e);
      total += weight * a.parts[(i * a.rows + row) * a.out.width + column];
    }
    out[column] = from_float<T>(total * inverse);
  }
  if (threadIdx.x == 0) a.lse[row] = sum == 0 ? -infinity : pivot + logf(sum);
}

template <class T, int D>
void decode(const ForwardArguments& a, const CombineArguments& combine, const AttentionForward& p,
            const Launch& launch) {
  using Cut = ForwardCut<D, true>;
  constexpr size_t shared_bytes = Cut::tiles_bytes + sizeof(ForwardBlock<true>);
  const int64_t blocks = int64_t(a.splits) * a.B * (a.H / a.group);
  start(name, p.query, attention_fwd_kernel<T, D, true>, Shape{dim3(unsigned(blocks)), dim3(threads), shared_bytes},
        launch, a);
  start("attention_decode: combine", p.query, attention_combine_kernel<T>,
        Shape{dim3(unsigned(combine.rows)), dim3(threads)}, launch, combine);
}

int64_t rows_of(const AttentionProblem& p) {
  return p.query.shape[0] * p.query.shape[1] * p.query.shape[2];
}

}  // namespace

DecodeSplit decode_split(const AttentionProblem& p) {
  const int64_t B = p.query.shape[0], T = p.query.shape[2], G = p.key.shape[1], S = p.key_count();
  const int64_t group = p.query.shape[1] / G;
  if (p.cu_seq_q || p.dropout_p > 0 || group * T > largest_tile || S < 2 * shortest_share) return {1, S};
  const int64_t many = ceil_div(many_rounds, B * G), few = ceil_div(one_round, B * G);
  const int64_t most = std::min(most_splits, ceil_div(S, shortest_share));
  const int64_t splits = std::max<int64_t>(1, std::min(most, S >= many * long_share ? many : few));
  const int64_t share = ceil_div(ceil_div(S, splits), 64) * 64;  // a multiple of every tile
  return {ceil_div(S, share), share};
}

int64_t attention_decode_workspace(const AttentionProblem& p, const DecodeSplit& split) {
  return ceil_div(split.splits * rows_of(p) * (p.value.shape[3] + 1) * int64_t(sizeof(float)), 16) * 16;
}

void attention_decode(const AttentionForward& p, const DecodeSplit& split, const Launch& launch) {
  char* workspace = launch.workspace.ptr<char>();
  ForwardArguments a{attention_arguments(name, p, launch, workspace + attention_decode_workspace(p, split))};
  a.mask.states = nullptr;  // a tile has rows of several heads
  a.splits = int(split.splits);
  a.share = int(split.share);
  if (p.block_table) a.pages = {p.block_table.ptr<const int32_t>(), p.block_table.stride[0], int(p.key.shape[2])};
  a.parts = reinterpret_cast<float*>(workspace);
  a.lse = a.parts + split.splits * rows_of(p) * p.value.shape[3];
  const CombineArguments combine{a.parts, a.lse,   heads(name, "out", p.out), p.lse.ptr<float>(), rows_of(p), a.H,
                                 a.T,     a.splits};
  by_dtype<__half, __nv_bfloat16>(name, p.query.dtype, [&](auto zero) {
    by_head_width(name, std::max(p.query.shape[3], p.value.shape[3]),
                  [&](auto width) { decode<decltype(zero), width()>(a, combine, p, launch); });
  });
}

}  // namespace pytransformer::cuda
