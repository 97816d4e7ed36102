"""The models whose sizes the benchmarks take: who asks how fast a layer is, asks for one of these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """What a layer of it looks like.

    Attributes:
        heads, kv_heads, head_dim: of attention; fewer key/value heads than heads is GQA.
        width, hidden: of the residual stream, and of the feed-forward network.
        vocabulary: tokens, or classes.
        causal: a query sees no later key.
        rms, gated: RMSNorm instead of LayerNorm, a gated feed-forward network.
        activation: of the feed-forward network.
    """

    name: str
    heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    kv_heads: int = 0
    causal: bool = False
    rms: bool = False
    gated: bool = False
    activation: str = "gelu"

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.kv_heads or self.heads


TRANSFORMER_BASE = Model("Transformer-base", 8, 64, 2048, 37000, activation="relu")
TRANSFORMER_BIG = Model("Transformer-big", 16, 64, 4096, 37000, activation="relu")
BERT_BASE = Model("BERT-base", 12, 64, 3072, 30522)
BERT_LARGE = Model("BERT-large", 16, 64, 4096, 30522)
GPT2 = Model("GPT-2", 12, 64, 3072, 50257, causal=True, activation="gelu_tanh")
VIT_BASE = Model("ViT-B", 12, 64, 3072, 1000)
WHISPER_SMALL = Model("Whisper-small", 12, 64, 3072, 51865)
LLAMA_3_8B = Model("Llama-3-8B", 32, 128, 14336, 128256, 8, True, True, True, "silu")
