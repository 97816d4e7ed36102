"""linear_cross_entropy by ``kernels/linear_cross_entropy.py``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pytransformer.backends._arguments import contiguous, rows, unsupported_dtype
from pytransformer.backends._products import reduced, row_scale
from pytransformer.kernels import linear_cross_entropy as kernels


def why_not(input: Tensor, linear_weight: Tensor, *rest: object) -> str | None:
    if (reason := unsupported_dtype(input)) is not None:
        return reason
    if 0 in linear_weight.shape:
        return f"it takes no weight of shape {list(linear_weight.shape)}"
    return None


def linear_cross_entropy_fwd(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    loss, lse, grads = kernels.losses(
        rows(input),
        contiguous(linear_weight),
        linear_bias,
        target.flatten(),
        kernels.Loss(ignore_index, label_smoothing, z_loss, softcap),
        row_scale(target, reduction, ignore_index),
        [n and reduction != "none" for n in needs],
    )
    return reduced(loss, target, reduction, ignore_index), lse, *_shaped(grads, input)


def linear_cross_entropy_bwd(
    grad_loss: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    # Neither the logits nor lse are taken from the forward: a float32 lse would cost the digits of p - 1.
    _, _, grads = kernels.losses(
        rows(input),
        contiguous(linear_weight),
        linear_bias,
        target.flatten(),
        kernels.Loss(ignore_index, label_smoothing, z_loss, softcap),
        row_scale(target, reduction, ignore_index, grad_loss),
        needs,
    )
    return _shaped(grads, input)


def _shaped(grads: Sequence[Tensor | None], input: Tensor) -> tuple[Tensor, ...]:
    grad_input, *rest = (input.new_empty(0) if g is None else g for g in grads)
    return grad_input.view(input.shape) if grad_input.numel() else grad_input, *rest
