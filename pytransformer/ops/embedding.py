"""embedding: token, position and segment embeddings with scale and dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.backends import select
from pytransformer.ops._checks import (
    check_broadcasts,
    check_device,
    check_finite,
    check_floating,
    check_like,
    check_probability,
    check_shape,
    check_tensor,
    describe,
    random_state,
)
from pytransformer.ops._op import FusedOp, obstacle


class EmbeddingOp(FusedOp):
    name = "embedding"
    forward_schema = (
        "(Tensor tokens, Tensor weight, Tensor? positions, Tensor? segments, Tensor? segment_weight, Tensor? rng,"
        " float scale, float dropout_p) -> (Tensor, Tensor)"
    )
    backward_schema = (
        "(Tensor grad_output, Tensor tokens, Tensor weight, Tensor? positions, Tensor? segments,"
        " Tensor? segment_weight, Tensor? rng, Tensor saved, float scale, float dropout_p, bool[] needs)"
        " -> (Tensor, Tensor, Tensor)"
    )

    @staticmethod
    def fake_forward(tokens: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return weight.new_empty(*tokens.shape, weight.shape[1]), weight.new_empty(0)

    @staticmethod
    def fake_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        _, weight, positions, _, segment_weight = args[:5]
        return tuple(
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if n else weight.new_empty(0)
            for x, n in zip((weight, positions, segment_weight), args[-1], strict=True)
        )

    @staticmethod
    def save(args: Any, outputs: Any) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        return (*args[:6], outputs[1]), args[6:]

    @staticmethod
    def backward_args(saved: Any, extra: Any, grads: Any, needs: Any) -> tuple[Any, ...]:
        return (*grads, *saved, *extra, [needs[1], needs[2], needs[4]])

    @staticmethod
    def input_grads(grads: Any, needs: Any) -> tuple[Tensor | None, ...]:
        weight, positions, segment_weight = grads
        found = (None, weight, positions, None, segment_weight)
        return (*(g if n else None for g, n in zip(found, needs, strict=False)), *(None,) * 3)


_op = EmbeddingOp()


def embedding(
    tokens: Tensor,
    weight: Tensor,
    positions: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    segment_weight: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``output = dropout(scale * weight[tokens] + positions + segment_weight[segments])``.

    Args:
        tokens: integer [..., T], indices into ``weight``.
        weight: [V,E], floating point.
        positions: [T,E] or anything that broadcasts to [..., T, E]; added after the scale; differentiable.
        segments: integer, the shape of ``tokens``: indices into ``segment_weight``.
        segment_weight: [number of segments, E].
        scale: of the token embeddings; sqrt(E) in the original Transformer.
        dropout_p: probability of zeroing an element; applied whenever it is above 0.
        seed: of the dropout; an integer, an int64 tensor (seed, offset), or None to draw from torch's generator.
        backend: ``"auto"`` or the name of one; see ``pytransformer.backends``.

    Returns:
        [..., T, E] in the dtype of ``weight``.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong.
        IndexError: a token or segment lies outside its table (on CPU).
        BackendError: the named backend cannot serve the call.

    Source: Vaswani et al., 2017, sec. 3.4 and 3.5; Devlin et al., 2019, sec. 3.
    """
    _check(tokens, weight, positions, segments, segment_weight)
    check_finite("embedding", "scale", scale)
    check_probability("embedding", "dropout_p", dropout_p)
    if 0 in (tokens.numel(), weight.numel()):
        backend = "reference"  # nothing to compute, and no kernel takes a grid of no blocks
    rng = random_state("embedding", seed, dropout_p, tokens.device)
    args = (tokens, weight, positions, segments, segment_weight, rng, float(scale), float(dropout_p))
    name = select("embedding", tokens.device.type, backend, args, obstacle((weight, positions, segment_weight)))
    if name == "reference":
        return reference.embedding(*args)
    return _op(*args, name)[0]


def _check(
    tokens: Tensor,
    weight: Tensor,
    positions: Tensor | None,
    segments: Tensor | None,
    segment_weight: Tensor | None,
) -> None:
    check_floating("embedding", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight must be [V,E], got {describe(weight)}")
    for name, indices in (("tokens", tokens), ("segments", segments)):
        if indices is None:
            continue
        check_tensor("embedding", name, indices)
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"embedding: {name} must be int32 or int64, got {describe(indices)}")
        check_device("embedding", name, indices, "weight", weight)
        check_shape("embedding", name, indices, tokens.shape)
    if positions is not None:
        check_like("embedding", "positions", positions, "weight", weight)
        check_broadcasts("embedding", "positions", positions, (*tokens.shape, weight.shape[1]), "[..., T, E]")
    if (segments is None) != (segment_weight is None):
        raise ValueError("embedding: segments and segment_weight go together, got one of them")
    if segment_weight is not None:
        check_like("embedding", "segment_weight", segment_weight, "weight", weight)
        check_shape("embedding", "segment_weight", segment_weight, (segment_weight.shape[0], weight.shape[1]))
