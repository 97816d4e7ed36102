#include "ffn.h"

#include "simd.h"

namespace pytransformer::PYTRANSFORMER_ISA {

void ffn_fwd(const FfnForward&) {}
void ffn_bwd(const FfnBackward&) {}

}  // namespace pytransformer::PYTRANSFORMER_ISA
