// The host side of the backward, and what it needs of each query: the lse in units of log2, and delta.
#include "attention_bwd.cuh"

namespace pytransformer::cuda {
namespace {

constexpr const char* name = "attention_bwd";

// delta = sum(dOut * out): one warp a row, in one order.
template <class T>
__global__ void __launch_bounds__(threads)
    attention_bwd_statistics_kernel(const __grid_constant__ BackwardArguments a) {
  const int64_t row = int64_t(blockIdx.x) * warps + warp();
  if (row >= int64_t(a.B) * a.H * a.T) return;  // the whole warp
  const int64_t t = row % a.T;
  const int head = int(row / a.T % a.H), batch = int(row / a.T / a.H);
  if (t >= a.queries_in(batch)) return;
  const auto row_of = [&](const Heads& x) {
    return static_cast<const T*>(x.data) + a.of_queries(x, batch, head) + t * x.row;
  };
  const T *out = row_of(a.out), *grad_out = row_of(a.grad_out);
  float delta = 0;
  for (int column = lane() * 8; column < a.out.width; column += 32 * 8) {
    float x[8], y[8];
    load(out + column, x);
    load(grad_out + column, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) delta += x[i] * y[i];
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) delta += __shfl_xor_sync(all_lanes, delta, distance);
  if (lane() != 0) return;
  const int64_t at = a.of_rows(batch, head) + t;
  const float lse = a.lse[at];
  a.lse_in_log2[at] = lse == -infinity ? 0.0f : lse * log2_e;
  a.delta[at] = delta;
}

// Of the lse in units of log2, and of delta. They lie as the lse does: of sequences end to end, all queries of a head
// in one row.
int64_t statistics_bytes(const AttentionBackward& p) {
  const int64_t rows = p.cu_seq_q ? p.lse.shape[1] * p.lse.stride[1] : p.lse.numel();
  return ceil_div(rows * int64_t(sizeof(float)), 16) * 16;
}

}  // namespace

int64_t attention_bwd_workspace(const AttentionBackward& p) {
  return 2 * statistics_bytes(p) + packed_mask_bytes(p);
}

void attention_bwd(const AttentionBackward& p, const Launch& launch) {
  check_workspace(name, launch, attention_bwd_workspace(p));
  char* workspace = launch.workspace.ptr<char>();
  BackwardArguments a{attention_arguments(name, p, launch, workspace + 2 * statistics_bytes(p))};
  a.out = heads(name, "out", p.out);
  a.grad_out = heads(name, "grad_out", p.grad_out);
  a.lse = p.lse.ptr<const float>();
  a.lse_batch = p.lse.stride[0];
  a.lse_head = p.lse.stride[1];
  a.lse_in_log2 = reinterpret_cast<float*>(workspace);
  a.delta = reinterpret_cast<float*>(workspace + statistics_bytes(p));
  a.grad_query = heads(name, "grad_query", p.grad_query);
  a.grad_key = heads(name, "grad_key", p.grad_key);
  a.grad_value = heads(name, "grad_value", p.grad_value);
  a.grad_bias = p.grad_bias.ptr<float>();
  by_dtype<__half, __nv_bfloat16>(name, p.query.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = int64_t(a.B) * a.H * a.T;
    start("attention_bwd: statistics", p.query, attention_bwd_statistics_kernel<T>,
          Shape{dim3(unsigned(ceil_div(rows, warps))), dim3(threads)}, launch, a);
    attention_bwd_query<T>(a, p.query, launch);
    attention_bwd_key<T>(a, p.key, launch);
  });
}

}  // namespace pytransformer::cuda
