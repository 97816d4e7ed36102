"""linear_cross_entropy by ``csrc/cpu/linear_cross_entropy.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pytransformer import _cpu
from pytransformer.backends._arguments import contiguous, unsupported_dtype
from pytransformer.backends.cpu._memory import empty


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
    loss, lse = empty((target.numel(),)), empty((target.numel(),))
    counted = int((target != ignore_index).sum()) if reduction == "mean" else 1
    grads = _Gradients(input, linear_weight, [n and reduction != "none" for n in needs])
    _cpu.linear_cross_entropy_fwd(
        contiguous(input),
        contiguous(linear_weight),
        contiguous(linear_bias),
        target.flatten(),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        loss,
        lse,
        1 / max(counted, 1),
        *grads.views,
    )
    if reduction == "none":
        loss = loss.view(target.shape)
    else:
        loss = loss.sum() / counted if counted else loss.new_tensor(torch.nan)
    return loss, lse, *grads.tensors()


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
    if reduction == "mean":
        grad_loss = grad_loss / (target != ignore_index).sum().clamp(min=1)
    grads = _Gradients(input, linear_weight, needs)
    _cpu.linear_cross_entropy_bwd(
        grad_loss.expand(target.shape).contiguous().flatten(),
        contiguous(input),
        contiguous(linear_weight),
        contiguous(linear_bias),
        target.flatten(),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        *grads.views,
    )
    return grads.tensors()


class _Gradients:
    """Memory for the gradients that are needed; the kernel's ``views`` of the others are None."""

    def __init__(self, input: Tensor, weight: Tensor, needs: Sequence[bool]) -> None:
        self._input = empty(input.shape if needs[0] else (0,), input.dtype)
        self._weight = empty(weight.shape if needs[1] else (0,), weight.dtype)
        self._bias = empty(weight.shape[:1] if needs[2] else (0,))
        found = (self._input, self._weight, self._bias)
        self.views = tuple(x if n else None for x, n in zip(found, needs, strict=True))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._input, self._weight, self._bias.to(self._input.dtype)
