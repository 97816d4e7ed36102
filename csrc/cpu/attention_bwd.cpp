#include "attention_blocks.h"
namespace pytransformer::PYTRANSFORMER_ISA {
void attention_bwd(const AttentionBackward&) {}
}  // namespace pytransformer::PYTRANSFORMER_ISA
