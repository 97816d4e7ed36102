"""linear_cross_entropy by torch's matrix products and ``csrc/cuda/linear_cross_entropy.cu``, some rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import _cuda
from pytransformer.backends._arguments import contiguous
from pytransformer.backends._products import reduced, row_scale
from pytransformer.backends.cuda._arguments import call, rows, unsupported

_LOGITS = 2**27  # bytes of logits stored at a time: enough to fill a GPU with a product's tiles


def why_not(input: Tensor, linear_weight: Tensor, *rest: object) -> str | None:
    if (reason := unsupported(input)) is not None:
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
    scale = row_scale(target, reduction, ignore_index)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    wanted = [n and reduction != "none" for n in needs]
    loss, lse, grads = _losses(input, linear_weight, linear_bias, target, options, scale, wanted)
    return reduced(loss, target, reduction, ignore_index), lse, *grads


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
    scale = row_scale(target, reduction, ignore_index, grad_loss)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    return _losses(input, linear_weight, linear_bias, target, options, scale, needs)[2]


def _losses(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: tuple[int, float, float, float],
    scales: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """``(loss, lse, gradients)``: float32 [N] each, and the gradients of input, weight and bias as ``needs`` asks.

    The gradients are of the losses' sum, each loss times its one of ``scales``, float32 [N] or [1].
    """
    x, classes = rows(input), target.flatten().contiguous()
    weight = contiguous(weight)
    loss, lse = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    size = _rows_at_a_time(x.shape[0], weight.shape[0] * x.element_size())
    gradients = _Gradients(x, weight, needs, whole=size >= x.shape[0])
    for start in range(0, x.shape[0], size):
        part = slice(start, min(start + size, x.shape[0]))
        logits = F.linear(x[part], weight, bias)
        scale = (scales if scales.numel() == 1 else scales[part]) if any(needs) else None
        _cuda.cross_entropy_rows(logits, classes[part], *options, scale, loss[part], lse[part], call(x))
        if any(needs):
            gradients.add(part, logits)
    grad_input, *rest = gradients.found()
    return loss, lse, (grad_input.view(input.shape) if needs[0] else grad_input, *rest)


def _rows_at_a_time(count: int, row_bytes: int) -> int:
    chunks = max(-(-count * row_bytes // _LOGITS), 1)
    return max(-(-count // chunks), 1)


class _Gradients:
    """Adds up what the gradient of each chunk's logits gives, the sums over chunks in float32."""

    def __init__(self, x: Tensor, weight: Tensor, needs: Sequence[bool], whole: bool) -> None:
        self.x, self.weight, self.whole, self.needs = x, weight, whole, needs
        self.grad_input = torch.empty_like(x) if needs[0] else x.new_empty(0)
        self.grad_weight = x.new_empty(0)
        if needs[1] and not whole:
            self.grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        count = weight.shape[0] if needs[2] else 0
        self.grad_bias = torch.zeros(count, dtype=torch.float32, device=x.device)

    def add(self, part: slice, grad_logits: Tensor) -> None:
        if self.needs[0]:
            torch.mm(grad_logits, self.weight, out=self.grad_input[part])
        if self.needs[1] and self.whole:
            self.grad_weight = grad_logits.mT @ self.x
        elif self.needs[1]:
            _add_product(self.grad_weight, grad_logits.mT, self.x[part])
        if self.needs[2]:
            self.grad_bias += grad_logits.sum(0, dtype=torch.float32)

    def found(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of input, weight and bias, in the dtype of the input; empty where not needed."""
        return self.grad_input, self.grad_weight.to(self.x.dtype), self.grad_bias.to(self.x.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, float32 of operands in 16 bits or float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
