"""Drop-in modules: the signatures, masks, state_dict keys and initial weights of torch.nn, over the fused ops.

    from pytransformer import nn            # in place of `from torch import nn`, for the classes below

Every class is a subclass of torch's where torch has one, so checkpoints load both ways and ``isinstance`` checks
hold. docs/differences.md lists where the behaviour differs from torch's, and why.
"""

from pytransformer.nn.attention import MultiheadAttention
from pytransformer.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from pytransformer.nn.embedding import Embedding, PositionalEncoding
from pytransformer.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from pytransformer.nn.ffn import FeedForward
from pytransformer.nn.layer_norm import LayerNorm, RMSNorm
from pytransformer.nn.loss import LinearCrossEntropyLoss
from pytransformer.nn.scores import AdditiveAttention, CosineAttention
from pytransformer.nn.transformer import Transformer

__all__ = [
    "AdditiveAttention",
    "CosineAttention",
    "Embedding",
    "FeedForward",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "MultiheadAttention",
    "PositionalEncoding",
    "RMSNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
