"""The public functions. Each checks its arguments, chooses a backend and is differentiable."""

from pytransformer.ops.attention import attention
from pytransformer.ops.attention_decode import attention_decode
from pytransformer.ops.attention_varlen import attention_varlen
from pytransformer.ops.embedding import embedding
from pytransformer.ops.ffn import ffn
from pytransformer.ops.layer_norm import layer_norm, rms_norm
from pytransformer.ops.linear import linear
from pytransformer.ops.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "attention",
    "attention_decode",
    "attention_varlen",
    "embedding",
    "ffn",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
]
