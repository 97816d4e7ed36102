#include "attention_fwd_sm90.cuh"

namespace pytransformer::cuda {

void attention_fwd_sm90(const ForwardArguments& a, const AttentionForward& p, const Launch& launch) {
  constexpr const char* name = "attention_fwd";
  by_dtype<__half, __nv_bfloat16>(name, p.query.dtype, [&](auto zero) {
    by_panels(name, std::max(p.query.shape[3], p.value.shape[3]), [&](auto width) {
      using Cut = HopperForward<width()>;
      const int64_t blocks = ceil_div(a.T, Cut::block_rows) * a.B * a.H;
      start_roles<Cut>(name, p.query, attention_fwd_sm90_kernel<decltype(zero), width()>, a, blocks, launch);
    });
  });
}

}  // namespace pytransformer::cuda
