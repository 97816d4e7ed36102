"""embedding by ``csrc/cpu/embedding.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pytransformer import _cpu
from pytransformer.backends._arguments import contiguous, flat, position_index, unsupported_dtype
from pytransformer.backends.cpu._memory import empty


def why_not(tokens: Tensor, weight: Tensor, positions: Tensor | None, *rest: object) -> str | None:
    if (reason := unsupported_dtype(weight)) is not None:
        return reason
    if weight.shape[1] == 0:
        return "it takes no weight of width 0"
    if positions is not None and (positions.dim() == 0 or positions.shape[-1] != weight.shape[1]):
        return f"positions must be as wide as weight, got {list(positions.shape)}"
    return None


def embedding_fwd(
    tokens: Tensor,
    weight: Tensor,
    positions: Tensor | None,
    segments: Tensor | None,
    segment_weight: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    output = empty((*tokens.shape, weight.shape[1]), weight.dtype)
    _cpu.embedding_fwd(
        contiguous(weight),
        flat(tokens),
        scale,
        contiguous(positions),
        position_index(positions, tokens),
        contiguous(segment_weight),
        flat(segments),
        dropout_p,
        output,
        contiguous(rng),
    )
    return output, weight.new_empty(0)


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
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    tables = (weight, positions, segment_weight)
    grads = tuple(
        empty(x.shape if n and x is not None else (0,), weight.dtype) for x, n in zip(tables, needs, strict=True)
    )
    grad_weight, grad_positions, grad_segment_weight = (g if n else None for g, n in zip(grads, needs, strict=True))
    _cpu.embedding_bwd(
        contiguous(grad_output),
        flat(tokens),
        scale,
        position_index(positions, tokens),
        flat(segments),
        dropout_p,
        grad_weight,
        grad_positions,
        grad_segment_weight,
        contiguous(rng),
    )
    return grads
