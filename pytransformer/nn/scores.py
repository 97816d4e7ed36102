"""Other scores than the scaled dot product: cosine and additive attention, as multi-head modules.

Both are a ``MultiheadAttention`` in everything but how a query and a key become a score, so they take its arguments,
masks and caches, and can take its place in a layer: ``layer.self_attn = CosineAttention(...)``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.masks import Mask
from pytransformer.nn.attention import MultiheadAttention


class CosineAttention(MultiheadAttention):
    """``score = scale_h * <q, k> / (|q| |k|)`` of each head, on the fused attention.

    Args:
        embed_dim, num_heads and all others: as in ``MultiheadAttention``.
        scale: of the cosines; None learns one per head, kept as its logarithm in ``log_scale`` [H], which starts at
            log 10.

    Source: Henry et al., "Query-Key Normalization for Transformers", 2020; Liu et al., "Swin Transformer V2", 2022,
    sec. 3.3.
    """

    def __init__(self, embed_dim: int, num_heads: int, *args: Any, scale: float | None = None, **kwargs: Any) -> None:
        super().__init__(embed_dim, num_heads, *args, **kwargs)
        self.scale = scale
        if scale is None:
            like = self.out_proj.weight
            log_scale = torch.full((num_heads,), math.log(10), device=like.device, dtype=like.dtype)
            self.log_scale = nn.Parameter(log_scale)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, added: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if self.scale is None:
            q = q * self.log_scale.exp().to(q.dtype)[:, None, None]
        return self._fused(q, k, v, mask, added, need_weights, 1.0 if self.scale is None else self.scale)


class AdditiveAttention(MultiheadAttention):
    """``score = <w_h, tanh(q + k)>`` of each head, with the projections' q and k and a learned ``score_weight`` w
    [H,D], which starts uniform in +-1/sqrt(D).

    The scores are computed by plain PyTorch and hold a [B,H,L,S,D] tensor: for small sizes, and for comparison.
    Masks, softmax, dropout and the product with the values are the fused attention's.

    Args:
        embed_dim, num_heads and all others: as in ``MultiheadAttention``.

    Source: Bahdanau et al., "Neural Machine Translation by Jointly Learning to Align and Translate", 2015, A.1.2.
    """

    def __init__(self, embed_dim: int, num_heads: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(embed_dim, num_heads, *args, **kwargs)
        self.score_weight = nn.Parameter(torch.empty_like(self.out_proj.weight[:num_heads, : self.head_dim]))
        bound = 1 / math.sqrt(self.head_dim)
        nn.init.uniform_(self.score_weight, -bound, bound)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, added: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        hidden = torch.tanh(q[:, :, :, None] + k[:, :, None])
        scores = (hidden @ self.score_weight.to(hidden.dtype)[None, :, None, :, None])[..., 0]
        added = scores if added is None else scores + added
        nothing = q.new_zeros(*q.shape[:3], 1), k.new_zeros(*k.shape[:3], 1)
        return self._fused(*nothing, v, mask, added, need_weights, 1.0)
