"""linear_cross_entropy: the loss of a linear classifier over a large vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.backends import select
from pytransformer.ops._autocast import autocast_off, cast_to, without_autocast
from pytransformer.ops._checks import (
    check_choice,
    check_device,
    check_finite,
    check_floating,
    check_like,
    check_parameter,
    check_probability,
    check_shape,
    check_tensor,
    describe,
)
from pytransformer.ops._op import FusedOp, needs_grad, obstacle

_OP = "linear_cross_entropy"


class LinearCrossEntropyOp(FusedOp):
    """Returns ``(loss, lse, grad_input, grad_weight, grad_bias)``: the gradients of a mean or a sum are formed where
    the logits are at hand, in the forward, as far as ``needs`` asks for them; the backward scales them. By a factor
    that is no power of two, that rounds gradients of 16 bits a second time."""

    name = "linear_cross_entropy"
    forward_schema = (
        "(Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, str reduction, int ignore_index,"
        " float label_smoothing, float z_loss, float softcap, bool[] needs)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    backward_schema = (
        "(Tensor grad_loss, Tensor input, Tensor linear_weight, Tensor? linear_bias, Tensor target, Tensor lse,"
        " str reduction, int ignore_index, float label_smoothing, float z_loss, float softcap, bool[] needs)"
        " -> (Tensor, Tensor, Tensor)"
    )

    @staticmethod
    def fake_forward(input: Tensor, weight: Tensor, bias: Any, target: Tensor, reduction: str, *rest: Any) -> Any:
        dtype = torch.promote_types(input.dtype, torch.float32)
        loss = input.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
        stored = [n and reduction != "none" for n in rest[-1]]
        grads = _empty((input, weight, bias), stored)
        return loss, input.new_empty(target.numel(), dtype=dtype), *grads

    @staticmethod
    def fake_backward(grad_loss: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return _empty(args[:3], args[-1])

    @staticmethod
    def save(args: Any, outputs: Any) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        return (*args[:4], *outputs[1:]), args[4:-1]

    @staticmethod
    def backward_args(saved: Any, extra: Any, grads: Any, needs: Any) -> tuple[Any, ...]:
        return (*grads, *saved[:5], *extra, list(needs[:3]))

    def _differentiate(self, ctx: Any, grads: Any, run: Any) -> tuple[Tensor | None, ...]:
        stored, needs = ctx.saved_tensors[5:], ctx.needs_input_grad[:3]
        grad_loss = grads[0]
        unstored = any(n and g.numel() == 0 for g, n in zip(stored, needs, strict=True))
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if grad_loss is None or unstored or twice:
            return super()._differentiate(ctx, grads, run)
        if run == self._eager_backward and not torch._C._autograd._get_current_graph_task_keep_graph():
            # Nobody will ask for the stored gradients again: they need no second copy.
            if grad_loss.device.type != "cpu" or grad_loss != 1:
                for g in stored:
                    g.mul_(grad_loss)
        else:
            stored = [g * grad_loss for g in stored]
        return (*self.input_grads(stored, needs), None)

    @staticmethod
    def input_grads(grads: Any, needs: Any) -> tuple[Tensor | None, ...]:
        return (*(g if n else None for g, n in zip(grads, needs, strict=False)), *(None,) * 7)


def _empty(tensors: tuple[Any, ...], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """A tensor like each of ``tensors`` that is wanted, contiguous; an empty one for every other."""
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if n else tensors[0].new_empty(0)
        for x, n in zip(tensors, wanted, strict=True)
    )


_op = LinearCrossEntropyOp()


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """``loss_n = (1-e) * -log p[target_n] + e/V * sum_v -log p[v] + z_loss * lse_n^2`` with
    ``p = softmax(input linear_weight^T + linear_bias)`` and e = ``label_smoothing``.

    Args:
        input: [..., E], floating point.
        linear_weight: [V,E], as ``nn.Linear`` stores it (or an embedding table, when tied).
        target: integer [...], class indices in [0, V) or ``ignore_index``.
        linear_bias: [V] or None.
        reduction: ``"mean"`` over the targets that count, ``"sum"`` or ``"none"``.
        ignore_index: targets of this value add nothing to the loss.
        label_smoothing: in [0, 1].
        z_loss: weight of the squared log of the normaliser, at least 0.
        softcap: c > 0 replaces each logit x by c * tanh(x / c).
        backend: ``"auto"`` or the name of one; see ``pytransformer.backends``.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or [...] with ``reduction="none"``. The mean over no
        target is NaN, as in torch. The gradients of a scalar are formed with it and scaled in the backward: in
        16 bits a factor that is no power of two rounds them once more.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong.
        IndexError: a target lies outside [0, V) and is not ``ignore_index`` (on CPU).
        BackendError: the named backend cannot serve the call.

    Source: Szegedy et al., 2016, sec. 7; Chowdhery et al., 2022, sec. 5; Wijmans et al., 2024.
    """
    _check(input, linear_weight, target, linear_bias)
    check_choice(_OP, "reduction", reduction, ("mean", "sum", "none"))
    check_probability(_OP, "label_smoothing", label_smoothing)
    for name, x in (("z_loss", z_loss), ("softcap", softcap or 0.0)):
        check_finite(_OP, name, x)
        if x < 0:
            raise ValueError(f"{_OP}: {name} must not be negative, got {x!r}")
    tensors: tuple[Any, ...] = (input, linear_weight, linear_bias)
    if not autocast_off(input.device.type):
        tensors = cast_to(torch.get_autocast_dtype(input.device.type), *tensors)
    args = (
        *tensors,
        target.long(),
        reduction,
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        float(softcap or 0),
        [needs_grad(x) for x in tensors],
    )
    name = select(_OP, input.device.type, backend, args, obstacle(tensors))
    if name == "reference":
        with without_autocast(input.device.type):
            return reference.linear_cross_entropy(*args[:-1])
    return _op(*args, name)[0]


def _check(input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None) -> None:
    check_floating(_OP, "input", input)
    check_like(_OP, "linear_weight", linear_weight, "input", input)
    if input.dim() == 0 or linear_weight.dim() != 2:
        raise ValueError(
            f"{_OP}: input must be [..., E] and linear_weight [V,E],"
            f" got {describe(input)} and {describe(linear_weight)}"
        )
    check_shape(_OP, "linear_weight", linear_weight, (linear_weight.shape[0], input.shape[-1]), "[V,E]")
    check_tensor(_OP, "target", target)
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"{_OP}: target must hold class indices, got {describe(target)}")
    check_shape(_OP, "target", target, input.shape[:-1])
    check_device(_OP, "target", target, "input", input)
    if linear_bias is not None:
        check_parameter(_OP, "linear_bias", linear_bias, linear_weight.shape[0], input)
        check_like(_OP, "linear_bias", linear_bias, "input", input)
