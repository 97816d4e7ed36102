// The kernels of the CUDA module, as the bindings call them. A new op adds its functions here.
//
// A function takes the problem and where to run it, starts its kernels on the stream and returns without waiting. The
// current device is the tensors' (DeviceGuard). No CUDA header is needed to include this.
#pragma once

#include "device.h"
#include "tensor_view.h"

struct CUstream_st;  // what a cudaStream_t points to

namespace pytransformer {

struct AttentionProblem;
struct AttentionForward;
struct AttentionBackward;
struct CrossEntropyRows;
struct EmbeddingForward;
struct EmbeddingTableBackward;
struct FfnActivationBackward;
struct FfnActivationForward;
struct LayerNormForward;
struct LayerNormBackward;

namespace cuda {

struct Launch {
  CUstream_st* stream = nullptr;
  // Philox seed and offset, read by the kernels themselves, so that a replayed CUDA graph draws afresh. A problem's own
  // seed and offset are the CPU's. Null without dropout.
  const int64_t* rng = nullptr;
  TensorView workspace;  // scratch memory of the size the op asks for; whatever it holds is overwritten
  TensorView counters;   // int32, all zero when a kernel starts, and when it has ended; absent where none counts
};

void attention_fwd(const AttentionForward& a, const Launch& launch);
void attention_bwd(const AttentionBackward& a, const Launch& launch);
// Bytes of workspace that they need.
int64_t attention_fwd_workspace(const AttentionProblem& problem);
int64_t attention_bwd_workspace(const AttentionBackward& problem);
void cross_entropy_rows(const CrossEntropyRows& a, const Launch& launch);
void embedding_fwd(const EmbeddingForward& a, const Launch& launch);
void embedding_table_bwd(const EmbeddingTableBackward& a, const Launch& launch);
void ffn_activation_fwd(const FfnActivationForward& a, const Launch& launch);
void ffn_activation_bwd(const FfnActivationBackward& a, const Launch& launch);
void layer_norm_fwd(const LayerNormForward& a, const Launch& launch);
void layer_norm_bwd(const LayerNormBackward& a, const Launch& launch);

}  // namespace cuda
}  // namespace pytransformer
