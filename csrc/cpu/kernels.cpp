// This instruction set's table. See kernels.h.
#include "kernels.h"

namespace pytransformer::PYTRANSFORMER_ISA {

void attention_fwd(const AttentionForward&);
void attention_bwd(const AttentionBackward&);
void layer_norm_fwd(const LayerNormForward&);
void layer_norm_bwd(const LayerNormBackward&);
void ffn_fwd(const FfnForward&);
void ffn_bwd(const FfnBackward&);
void linear_fwd(const LinearForward&);
void linear_bwd(const LinearBackward&);
void linear_cross_entropy_fwd(const LinearCrossEntropyForward&);
void linear_cross_entropy_bwd(const LinearCrossEntropyBackward&);
void embedding_fwd(const EmbeddingForward&);
void embedding_bwd(const EmbeddingBackward&);
double peak_rate(bool paired, double seconds);

#define PYTRANSFORMER_STRING_(x) #x
#define PYTRANSFORMER_STRING(x) PYTRANSFORMER_STRING_(x)

extern const KernelTable table;
const KernelTable table = {
    PYTRANSFORMER_STRING(PYTRANSFORMER_ISA),
    attention_fwd,
    attention_bwd,
    layer_norm_fwd,
    layer_norm_bwd,
    ffn_fwd,
    ffn_bwd,
    linear_fwd,
    linear_bwd,
    linear_cross_entropy_fwd,
    linear_cross_entropy_bwd,
    embedding_fwd,
    embedding_bwd,
    peak_rate,
};

}  // namespace pytransformer::PYTRANSFORMER_ISA
