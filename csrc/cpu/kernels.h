// The kernels of one instruction set, and the choice among the sets at run time.
//
// kernels.cpp and every <op>.cpp are compiled once for each instruction set; each fills one table.
// A new op adds its functions here and in kernels.cpp.
#pragma once

#include <string>
#include <vector>

namespace pytransformer {

struct AttentionForward;
struct AttentionBackward;
struct LayerNormForward;
struct LayerNormBackward;
struct FfnForward;
struct FfnBackward;
struct LinearForward;
struct LinearBackward;
struct LinearCrossEntropyForward;
struct LinearCrossEntropyBackward;
struct EmbeddingForward;
struct EmbeddingBackward;

struct KernelTable {
  const char* isa;
  void (*attention_fwd)(const AttentionForward&);
  void (*attention_bwd)(const AttentionBackward&);
  void (*layer_norm_fwd)(const LayerNormForward&);
  void (*layer_norm_bwd)(const LayerNormBackward&);
  void (*ffn_fwd)(const FfnForward&);
  void (*ffn_bwd)(const FfnBackward&);
  void (*linear_fwd)(const LinearForward&);
  void (*linear_bwd)(const LinearBackward&);
  void (*linear_cross_entropy_fwd)(const LinearCrossEntropyForward&);
  void (*linear_cross_entropy_bwd)(const LinearCrossEntropyBackward&);
  void (*embedding_fwd)(const EmbeddingForward&);
  void (*embedding_bwd)(const EmbeddingBackward&);
  double (*peak_rate)(bool paired, double seconds);
};

// The table in use. At the first call: the one PYTRANSFORMER_ISA names, else the best the CPU runs.
const KernelTable& kernels();

// Every instruction set this module was built for, best last, and whether this CPU runs it.
struct IsaStatus {
  std::string name;
  bool supported;
};
std::vector<IsaStatus> isa_status();

// Uses the named set from now on; throws std::invalid_argument where it cannot run here.
void set_isa(const std::string& name);

}  // namespace pytransformer
