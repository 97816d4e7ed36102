"""layer_norm and rms_norm: normalisation with the bias, dropout and residual before it in one pass."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.backends import select
from pytransformer.ops._autocast import autocast_off, cast_to
from pytransformer.ops._checks import (
    check_finite,
    check_floating,
    check_like,
    check_parameter,
    check_probability,
    check_shape,
    random_state,
)
from pytransformer.ops._op import FusedOp, needs_grad, obstacle, recall, remember


class LayerNormOp(FusedOp):
    name = "layer_norm"
    forward_schema = (
        "(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? input_bias, Tensor? rng,"
        " float dropout_p, float eps, bool rms, bool store_sum) -> (Tensor, Tensor, Tensor, Tensor)"
    )
    backward_schema = (
        "(Tensor? grad_output, Tensor? grad_sum, Tensor stream, Tensor? weight, Tensor mean, Tensor rstd,"
        " Tensor? rng, float dropout_p, float eps, bool rms, bool[] needs)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    differentiable_outputs = 2

    @staticmethod
    def fake_forward(input: Tensor, *args: Any) -> tuple[Tensor, ...]:
        store_sum = args[-1]
        rows = input.numel() // input.shape[-1]
        statistics_dtype = torch.promote_types(input.dtype, torch.float32)
        output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
        total = torch.empty_like(output) if store_sum else input.new_empty(0)
        mean, rstd = (input.new_empty(rows, dtype=statistics_dtype) for _ in range(2))
        return output, total, mean, rstd

    @staticmethod
    def fake_backward(
        grad_output: Tensor | None, grad_sum: Tensor | None, stream: Tensor, *args: Any
    ) -> tuple[Tensor, ...]:
        dropout_p, needs = args[4], args[-1]
        vector_dtype = torch.promote_types(stream.dtype, torch.float32)
        grad_stream = torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
        grad_input = torch.empty_like(grad_stream) if dropout_p > 0 else stream.new_empty(0)
        columns = (stream.new_empty(stream.shape[-1] if n else 0, dtype=vector_dtype) for n in needs)
        return grad_stream, grad_input, *columns

    @staticmethod
    def save(args: Any, outputs: Any) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        input, weight, _, residual, input_bias, rng, dropout_p, eps, rms, store_sum = args
        _, total, mean, rstd = outputs
        stream = total if store_sum else input
        return (stream, weight, mean, rstd, rng), (dropout_p, eps, rms)

    @staticmethod
    def backward_args(saved: Any, extra: Any, grads: Any, needs: Any) -> tuple[Any, ...]:
        stream, weight, mean, rstd, rng = saved
        _, needs_weight, needs_bias, _, needs_input_bias, *_ = needs
        return (*grads, stream, weight, mean, rstd, rng, *extra, [needs_weight, needs_bias, needs_input_bias])

    @staticmethod
    def input_grads(grads: Any, needs: Any) -> tuple[Tensor | None, ...]:
        grad_stream, grad_input, grad_weight, grad_bias, grad_input_bias = grads
        if grad_input.numel() == 0:
            grad_input = grad_stream
        found = (grad_input, grad_weight, grad_bias, grad_stream, grad_input_bias)
        return (*(g if needed else None for g, needed in zip(found, needs, strict=False)), *(None,) * 5)


_op = LayerNormOp()


@overload
def layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = ...,
    residual: Tensor | None = ...,
    *,
    input_bias: Tensor | None = ...,
    dropout_p: float = ...,
    eps: float = ...,
    prenorm: Literal[False] = ...,
    seed: int | Tensor | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = ...,
    residual: Tensor | None = ...,
    *,
    input_bias: Tensor | None = ...,
    dropout_p: float = ...,
    eps: float = ...,
    prenorm: bool,
    seed: int | Tensor | None = ...,
    backend: str = ...,
) -> Any: ...
def layer_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    prenorm: bool = False,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """``sum = residual + dropout(input + input_bias)``; ``output = (sum - mean) / sqrt(var + eps) * weight + bias``.

    Args:
        input: [..., E], floating point.
        weight: [E] or None, of the input's dtype or float32.
        bias: [E] or None.
        residual: [..., E], the input's shape, or None.
        input_bias: [E] or None: the bias of the linear layer before, added before the dropout.
        dropout_p: probability of zeroing an element of ``input + input_bias``; applied whenever it is above 0.
        eps: added to the variance.
        prenorm: also return ``sum``, the residual stream of a pre-norm layer.
        seed: of the dropout; an integer, an int64 tensor (seed, offset), or None to draw from torch's generator.
        backend: ``"auto"`` or the name of one; see ``pytransformer.backends``.

    Returns:
        ``output`` [..., E] in the input's dtype; with ``prenorm`` the pair ``(output, sum)``.

    Numerics:
        Statistics and arithmetic in float32 (float64 for float64 inputs); two passes for the variance; ``sum``
        is rounded to the input's dtype before it is normalised when it is stored. Deterministic.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong.
        BackendError: the named backend cannot serve the call.

    Source: Ba, Kiros, Hinton, "Layer Normalization", 2016, eq. 4; Vaswani et al., 2017, sec. 3.1 and 5.4.
    """
    args = (input, weight, bias, residual, input_bias)
    return _normalize("layer_norm", *args, dropout_p, eps, prenorm, seed, backend, rms=False)


def rms_norm(
    input: Tensor,
    weight: Tensor | None,
    residual: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-6,
    prenorm: bool = False,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """``sum = residual + dropout(input + input_bias)``; ``output = sum / sqrt(mean(sum^2) + eps) * weight``.

    Arguments, returns, numerics and errors are those of ``layer_norm``, without a bias.

    Source: Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019, eq. 4.
    """
    args = (input, weight, None, residual, input_bias)
    return _normalize("rms_norm", *args, dropout_p, eps, prenorm, seed, backend, rms=True)


def _normalize(
    op: str,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_bias: Tensor | None,
    dropout_p: float,
    eps: float,
    prenorm: bool,
    seed: int | Tensor | None,
    backend: str,
    rms: bool,
) -> Any:
    tensors: tuple[Any, ...] = (input, weight, bias, residual, input_bias)
    signature, known = recall(op, tensors, backend, dropout_p, eps)
    if known is None:
        _check(op, input, weight, bias, residual, input_bias, dropout_p, eps)
        if not autocast_off(input.device.type):  # as torch's layer_norm: autocast runs it in float32
            tensors = cast_to(torch.float32, *tensors)
        if input.numel() == 0:
            backend = "reference"  # nothing to compute, and no kernel takes rows of no columns
    rng = random_state(op, seed, dropout_p, input.device) if dropout_p else None
    plain_sum = residual is None and input_bias is None and dropout_p == 0
    store_sum = not plain_sum and (prenorm or needs_grad(*tensors))
    args = (*tensors, rng, float(dropout_p), float(eps), rms, store_sum)
    name = known or select("layer_norm", input.device.type, backend, args, obstacle(tensors))
    remember(signature, name) if known is None else None
    if name == "reference":
        output, total = reference.layer_norm(*args[:-1])
        return (output, total) if prenorm else output
    output, total, _, _ = _op(*args, name) if known is None else _op.eager(*args, name)
    if not prenorm:
        return output
    return output, tensors[0] if plain_sum else total


def _check(
    op: str,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_bias: Tensor | None,
    dropout_p: float,
    eps: float,
) -> None:
    check_floating(op, "input", input)
    if input.dim() == 0:
        raise ValueError(f"{op}: input must be [..., E], got a scalar")
    for name, vector in (("weight", weight), ("bias", bias), ("input_bias", input_bias)):
        if vector is not None:
            check_parameter(op, name, vector, input.shape[-1], input)
    if residual is not None:
        check_like(op, "residual", residual, "input", input)
        check_shape(op, "residual", residual, input.shape)
    check_probability(op, "dropout_p", dropout_p)
    check_finite(op, "eps", eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must not be negative, got {eps!r}")
