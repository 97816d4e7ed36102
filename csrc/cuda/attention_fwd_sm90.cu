#include "attention_fwd_sm90.cuh"

#include <algorithm>

#include "device.h"

namespace pytransformer::cuda {
namespace {

constexpr const char* name = "attention_fwd";

template <class T, int D>
void forward(ForwardArguments& a, const AttentionForward& p, const Launch& launch) {
  using Cut = HopperForward<D>;
  constexpr size_t shared_bytes = Cut::tiles_bytes + sizeof(HopperBlock<Cut>);
  a.blocks = int(ceil_div(a.T, Cut::block_rows) * a.B * a.H);
  const Shape shape{dim3(unsigned(std::min(a.blocks, multiprocessors()))), dim3(Cut::threads), shared_bytes};
  start(name, p.query, attention_fwd_sm90_kernel<T, D>, shape, launch, a);
}

}  // namespace

void attention_fwd_sm90(ForwardArguments& a, const AttentionForward& p, const Launch& launch) {
  by_dtype<__half, __nv_bfloat16>(name, p.query.dtype, [&](auto zero) {
    by_panels(name, std::max(p.query.shape[3], p.value.shape[3]),
              [&](auto width) { forward<decltype(zero), width()>(a, p, launch); });
  });
}

}  // namespace pytransformer::cuda
