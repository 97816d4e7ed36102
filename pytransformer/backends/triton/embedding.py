"""embedding by ``kernels/embedding.py``."""

from __future__ import annotations

from torch import Tensor

from pytransformer.backends._arguments import contiguous, unsupported_dtype
from pytransformer.kernels import embedding as kernels


def why_not(tokens: Tensor, weight: Tensor, *rest: object) -> str | None:
    return unsupported_dtype(weight)


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
    output = kernels.embedding_fwd(
        _two_dimensional(tokens),
        weight.contiguous(),
        None if positions is None else _expanded(positions, tokens),
        None if segments is None else _two_dimensional(segments),
        contiguous(segment_weight),
        rng,
        scale,
        dropout_p,
    )
    return output.view(*tokens.shape, weight.shape[1]), output.new_empty(0)


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
    needs_weight, needs_positions, needs_segment_weight = needs
    dy = grad_output.contiguous()
    rows = dy.view(-1, weight.shape[1])
    grad_weight, grad_positions, grad_segment_weight = (weight.new_empty(0) for _ in range(3))
    if needs_weight:
        grad_weight = kernels.table_gradient(rows, tokens.flatten(), weight, rng, scale, dropout_p)
    if needs_positions and positions is not None:
        grad_positions = _position_gradient(dy, tokens, positions, rng, dropout_p)
    if needs_segment_weight and segments is not None and segment_weight is not None:
        grad_segment_weight = kernels.table_gradient(rows, segments.flatten(), segment_weight, rng, 1.0, dropout_p)
    return grad_weight, grad_positions, grad_segment_weight


def _two_dimensional(x: Tensor) -> Tensor:
    """[..., T] as contiguous [outer, T]."""
    return x.contiguous().view(-1, x.shape[-1] if x.dim() else 1)


def _expanded(positions: Tensor, tokens: Tensor) -> Tensor:
    """Contiguous: [T,E] where all sequences share their positions, else [outer,T,E]."""
    T, E = tokens.shape[-1] if tokens.dim() else 1, positions.shape[-1]
    if positions.numel() <= T * E and all(n == 1 for n in positions.shape[:-2]):
        return positions.reshape(-1, E).expand(T, E).contiguous()
    return positions.expand(*tokens.shape, E).reshape(-1, T, E).contiguous()


def _position_gradient(dy: Tensor, tokens: Tensor, positions: Tensor, rng: Tensor | None, dropout_p: float) -> Tensor:
    T, E = tokens.shape[-1] if tokens.dim() else 1, positions.shape[-1]
    if all(n == 1 for n in positions.shape[:-2]):
        found: Tensor = kernels.position_gradient(dy.view(-1, T, E), rng, dropout_p)
        return found.sum_to_size(positions.shape[-2:]).view(positions.shape).to(positions.dtype)
    found = kernels.position_gradient(dy.view(1, -1, E), rng, dropout_p).view(dy.shape)
    return found.sum_to_size(positions.shape).to(positions.dtype)
