"""embedding by ``csrc/cuda/embedding.cu``; tokens are sorted by torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pytransformer import _cuda
from pytransformer.backends._arguments import flat, position_index
from pytransformer.backends.cuda._arguments import aligned, call, rows, unsupported

_SEGMENT = 1024  # rows of a segment that one block adds up; longer ones are shared
_MOST_PARTS = 64


def why_not(tokens: Tensor, weight: Tensor, positions: Tensor | None, *rest: object) -> str | None:
    if (reason := unsupported(weight)) is not None:
        return reason
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
    output = torch.empty(*tokens.shape, weight.shape[1], dtype=weight.dtype, device=weight.device)
    _cuda.embedding_fwd(
        aligned(weight),
        flat(tokens),
        scale,
        rows(positions),
        position_index(positions, tokens),
        aligned(segment_weight),
        flat(segments),
        dropout_p,
        rows(output),
        call(weight, rng),
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
    """Gradients of weight, positions and segment_weight; empty where ``needs`` says no."""
    dy = rows(grad_output)
    found = [weight.new_empty(0) for _ in needs]
    if needs[0]:
        found[0] = _table_gradient(dy, flat(tokens), weight, rng, scale, dropout_p)
    if needs[1] and positions is not None:
        index = position_index(positions, tokens)
        found[1] = _table_gradient(dy, index, rows(positions), rng, 1.0, dropout_p).view(positions.shape)
    if needs[2] and segments is not None and segment_weight is not None:
        found[2] = _table_gradient(dy, flat(segments), segment_weight, rng, 1.0, dropout_p)
    return tuple(found)


def _table_gradient(
    dy: Tensor, index: Tensor | None, table: Tensor, rng: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """``scale`` times the rows of dy [N,E] after dropout, added up where ``index`` [N] names the row of ``table``;
    without one row n belongs to row n mod len(table)."""
    (count, width), tokens = table.shape, dy.shape[0]
    order = ends = None
    if index is not None:
        ordered, order = torch.sort(index, stable=True)
        ends = torch.searchsorted(ordered, torch.arange(count + 1, device=index.device))
    parts = min(max(tokens // (count * _SEGMENT), 1), _MOST_PARTS)
    dtype = table.dtype if parts == 1 else torch.float32
    grad = torch.empty(parts, count, width, dtype=dtype, device=dy.device)
    _cuda.embedding_table_bwd(dy, order, ends, scale, dropout_p, grad, call(dy, rng))
    return grad[0] if parts == 1 else grad.sum(0).to(table.dtype)
