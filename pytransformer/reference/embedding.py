"""Token, position and segment embeddings in plain PyTorch: the definition of the op.

    output = dropout(scale * weight[tokens] + positions + segment_weight[segments])

Source: Vaswani et al., "Attention Is All You Need", 2017, sec. 3.4 and 3.5; segments: Devlin et al., "BERT",
2019, sec. 3.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pytransformer.reference._autodiff import or_empty, vjp
from pytransformer.reference._philox import dropout_multiplier


def embedding(
    tokens: Tensor,
    weight: Tensor,
    positions: Tensor | None,
    segments: Tensor | None,
    segment_weight: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """``output`` [..., T, E], differentiable."""
    total = F.embedding(tokens, weight) * scale
    if positions is not None:
        total = total + positions
    if segments is not None and segment_weight is not None:
        total = total + F.embedding(segments, segment_weight)
    if dropout_p > 0:
        assert rng is not None
        total = total * dropout_multiplier(total.shape, rng, dropout_p, total.dtype)
    return total


def why_not(*args: object) -> str | None:
    return None


def embedding_fwd(*args: object) -> tuple[Tensor, Tensor]:
    """The arguments of ``embedding``; returns ``(output, saved)``, the second the backend's own."""
    output = embedding(*args)  # type: ignore[arg-type]
    return output, output.new_empty(0)


def embedding_bwd(
    grad_output: Tensor,
    tokens: Tensor,
    weight: Tensor,
    positions: Tensor | None,
    segments: Tensor | None,
    segment_weight: Tensor | None,
    rng: Tensor | None,
    saved: Tensor,
    scale: float,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of weight, positions and segment_weight; empty where ``needs`` says no."""

    def forward(w: Tensor, p: Tensor | None, s: Tensor | None) -> tuple[Tensor]:
        return (embedding(tokens, w, p, segments, s, rng, scale, dropout_p),)

    grads = vjp(forward, (weight, positions, segment_weight), (grad_output,))
    return tuple(or_empty(g if n else None, weight) for g, n in zip(grads, needs, strict=True))
