#include "attention.h"

#include "simd.h"

namespace pytransformer::PYTRANSFORMER_ISA {

void attention_fwd(const AttentionForward&) {}
void attention_bwd(const AttentionBackward&) {}

}  // namespace pytransformer::PYTRANSFORMER_ISA
