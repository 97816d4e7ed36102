"""The definition of each op in plain PyTorch: runs on any device and dtype, float64 included."""

from pytransformer.reference._philox import dropout_multiplier
from pytransformer.reference.attention import attention
from pytransformer.reference.embedding import embedding
from pytransformer.reference.ffn import ffn
from pytransformer.reference.layer_norm import layer_norm
from pytransformer.reference.linear import linear
from pytransformer.reference.linear_cross_entropy import linear_cross_entropy

__all__ = ["attention", "dropout_multiplier", "embedding", "ffn", "layer_norm", "linear", "linear_cross_entropy"]
