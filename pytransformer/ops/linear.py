"""linear: a product with a weight in nn.Linear's layout, and its bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.backends import select
from pytransformer.ops._autocast import autocast_off, cast_to, without_autocast
from pytransformer.ops._checks import check_floating, check_like, check_parameter, check_shape, describe
from pytransformer.ops._op import FusedOp, obstacle, recall, remember


class LinearOp(FusedOp):
    """The second result of the forward is empty: the results of an op are a tuple, and a schema has none of one."""

    name = "linear"
    forward_schema = "(Tensor input, Tensor weight, Tensor? bias) -> (Tensor, Tensor)"
    backward_schema = (
        "(Tensor grad_output, Tensor input, Tensor weight, Tensor? bias, bool[] needs) -> (Tensor, Tensor, Tensor)"
    )

    @staticmethod
    def fake_forward(input: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return input.new_empty(*input.shape[:-1], weight.shape[0]), input.new_empty(0)

    @staticmethod
    def fake_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        tensors, needs = args[:3], args[-1]
        return tuple(
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if n else grad_output.new_empty(0)
            for x, n in zip(tensors, needs, strict=True)
        )

    @staticmethod
    def save(args: Any, outputs: Any) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        return args[:3], ()

    @staticmethod
    def backward_args(saved: Any, extra: Any, grads: Any, needs: Any) -> tuple[Any, ...]:
        return (*grads, *saved, list(needs[:3]))

    @staticmethod
    def input_grads(grads: Any, needs: Any) -> tuple[Tensor | None, ...]:
        return tuple(g if n else None for g, n in zip(grads, needs, strict=False))


_op = LinearOp()


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """``output = input weight^T + bias``.

    Args:
        input: [..., E], floating point.
        weight: [O,E], as ``nn.Linear`` stores it.
        bias: [O] or None.
        backend: ``"auto"`` or the name of one; see ``pytransformer.backends``. On GPUs torch's own product serves.

    Returns:
        ``output`` [..., O] in the input's dtype.

    Numerics:
        Sums in float32 (float64 for float64), rounded once. Deterministic.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or device is wrong.
        BackendError: the named backend cannot serve the call.
    """
    tensors: tuple[Any, ...] = (input, weight, bias)
    signature, known = recall("linear", tensors, backend)
    if known is None:
        _check(input, weight, bias)
        if not autocast_off(input.device.type):
            tensors = cast_to(torch.get_autocast_dtype(input.device.type), *tensors)
        if 0 in (input.numel(), weight.numel()):
            backend = "reference"  # nothing to compute, and no kernel takes matrices of no rows or columns
    name = known or select("linear", input.device.type, backend, tensors, obstacle(tensors))
    remember(signature, name) if known is None else None
    if name == "reference":
        with without_autocast(input.device.type):
            return reference.linear(*tensors)
    return (_op(*tensors, name) if known is None else _op.eager(*tensors, name))[0]


def _check(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating("linear", "input", input)
    if input.dim() == 0:
        raise ValueError("linear: input must be [..., E], got a scalar")
    check_like("linear", "weight", weight, "input", input)
    if weight.dim() != 2:
        raise ValueError(f"linear: weight must be a matrix in nn.Linear's layout, got {describe(weight)}")
    check_shape("linear", "weight", weight, (weight.shape[0], input.shape[-1]), "[O,E]")
    if bias is not None:
        check_parameter("linear", "bias", bias, weight.shape[0], input)
        check_like("linear", "bias", bias, "input", input)
