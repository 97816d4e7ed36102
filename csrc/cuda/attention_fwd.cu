#include <algorithm>

#include "attention_fwd_sm80.cuh"

namespace pytransformer::cuda {
namespace {

constexpr const char* name = "attention_fwd";

template <class T, int D>
void forward(const ForwardArguments& a, const AttentionForward& p, const Launch& launch) {
  using Cut = ForwardCut<D, false>;
  constexpr size_t shared_bytes = Cut::tiles_bytes + sizeof(ForwardBlock<false>);
  const int64_t blocks = ceil_div(a.T, Cut::queries) * a.B * a.H;
  start(name, p.query, attention_fwd_kernel<T, D, false>, Shape{dim3(unsigned(blocks)), dim3(threads), shared_bytes},
        launch, a);
}

}  // namespace

int64_t attention_fwd_workspace(const AttentionProblem& p) {
  const DecodeSplit split = decode_split(p);
  return packed_mask_bytes(p) + (split.splits > 1 || p.block_table ? attention_decode_workspace(p, split) : 0);
}

void attention_fwd(const AttentionForward& p, const Launch& launch) {
  check_workspace(name, launch, attention_fwd_workspace(p));
  const DecodeSplit split = decode_split(p);
  if (split.splits > 1 || p.block_table) return attention_decode(p, split, launch);
  ForwardArguments a{attention_arguments(name, p, launch, launch.workspace.ptr<char>())};
  a.out = heads(name, "out", p.out);
  a.lse = p.lse.ptr<float>();
  a.lse_batch = p.lse.stride[0];
  a.lse_head = p.lse.stride[1];
  const int64_t widest = std::max(p.query.shape[3], p.value.shape[3]);
  if constexpr (hopper_built) {
    if (hopper_serves(widest)) return attention_fwd_sm90(a, p, launch);
  }
  by_dtype<__half, __nv_bfloat16>(name, p.query.dtype, [&](auto zero) {
    by_head_width(name, widest, [&](auto width) { forward<decltype(zero), width()>(a, p, launch); });
  });
}

}  // namespace pytransformer::cuda
