"""ffn: the position-wise feed-forward network, activation and biases fused with the matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.backends import select
from pytransformer.ops._autocast import autocast_off, cast_to, without_autocast
from pytransformer.ops._checks import (
    check_choice,
    check_floating,
    check_like,
    check_parameter,
    check_probability,
    check_shape,
    describe,
    random_state,
)
from pytransformer.ops._op import FusedOp, needs_grad, obstacle, recall, remember
from pytransformer.reference.ffn import ACTIVATIONS


class FfnOp(FusedOp):
    name = "ffn"
    forward_schema = (
        "(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, Tensor? weight_gate,"
        " Tensor? bias_gate, Tensor? rng, str activation, float dropout_p, bool store_hidden) -> (Tensor, Tensor)"
    )
    backward_schema = (
        "(Tensor grad_output, Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2,"
        " Tensor? weight_gate, Tensor? bias_gate, Tensor hidden, Tensor? rng, str activation, float dropout_p,"
        " bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    @staticmethod
    def fake_forward(input: Tensor, weight1: Tensor, bias1: Any, weight2: Tensor, *args: Any) -> tuple[Tensor, ...]:
        lead = input.shape[:-1]
        hidden = input.new_empty((*lead, weight1.shape[0]) if args[-1] else (0,))
        return input.new_empty(*lead, weight2.shape[0]), hidden

    @staticmethod
    def fake_backward(grad_output: Tensor, *args: Any) -> tuple[Tensor, ...]:
        tensors, needs = args[:7], args[-1]
        return tuple(
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if n else grad_output.new_empty(0)
            for x, n in zip(tensors, needs, strict=True)
        )

    @staticmethod
    def save(args: Any, outputs: Any) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        tensors, rng, activation, dropout_p = args[:7], args[7], args[8], args[9]
        return (*tensors, outputs[1], rng), (activation, dropout_p)

    @staticmethod
    def backward_args(saved: Any, extra: Any, grads: Any, needs: Any) -> tuple[Any, ...]:
        return (*grads, *saved, *extra, list(needs[:7]))

    @staticmethod
    def input_grads(grads: Any, needs: Any) -> tuple[Tensor | None, ...]:
        return (*(g if n else None for g, n in zip(grads, needs, strict=False)), *(None,) * 4)


_op = FfnOp()


def ffn(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str = "relu",
    *,
    dropout_p: float = 0.0,
    weight_gate: Tensor | None = None,
    bias_gate: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``output = dropout(activation(input weight1^T + bias1)) weight2^T + bias2``.

    With ``weight_gate`` the activated hidden is multiplied by ``input weight_gate^T + bias_gate`` (GLU forms).

    Args:
        input: [..., E], floating point.
        weight1: [F,E], as ``nn.Linear`` stores it. bias1: [F] or None.
        weight2: [O,F]. bias2: [O] or None.
        activation: ``"relu"``, ``"gelu"`` (exact, erf), ``"gelu_tanh"`` or ``"silu"``.
        dropout_p: probability of zeroing an element of the hidden; applied whenever it is above 0.
        weight_gate: [F,E] or None. bias_gate: [F] or None.
        seed: of the dropout; an integer, an int64 tensor (seed, offset), or None to draw from torch's generator.
        backend: ``"auto"`` or the name of one; see ``pytransformer.backends``.

    Returns:
        ``output`` [..., O] in the input's dtype.

    Numerics:
        Products accumulate in float32 (float64 for float64); the hidden is rounded to the input's dtype once,
        before the second product. Deterministic.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape, device or value is wrong.
        BackendError: the named backend cannot serve the call.

    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 2; gated forms: Shazeer, 2020, eq. 5.
    """
    tensors: tuple[Any, ...] = (input, weight1, bias1, weight2, bias2, weight_gate, bias_gate)
    training = needs_grad(*tensors)
    signature, known = recall("ffn", tensors, backend, activation, dropout_p, training)
    if known is None:
        _check(*tensors)
        check_choice("ffn", "activation", activation, tuple(ACTIVATIONS))
        check_probability("ffn", "dropout_p", dropout_p)
        if not autocast_off(input.device.type):
            tensors = cast_to(torch.get_autocast_dtype(input.device.type), *tensors)
        if 0 in (input.numel(), weight1.numel(), weight2.numel()):
            backend = "reference"  # nothing to compute, and no kernel takes matrices of no rows or columns
    rng = random_state("ffn", seed, dropout_p, input.device) if dropout_p else None
    args = (*tensors, rng, activation, float(dropout_p), training)
    name = known or select("ffn", input.device.type, backend, args, obstacle(tensors))
    remember(signature, name) if known is None else None
    if name == "reference":
        with without_autocast(input.device.type):
            return reference.ffn(*args[:-1])
    return (_op(*args, name) if known is None else _op.eager(*args, name))[0]


def _check(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    weight_gate: Tensor | None,
    bias_gate: Tensor | None,
) -> None:
    check_floating("ffn", "input", input)
    if input.dim() == 0:
        raise ValueError("ffn: input must be [..., E], got a scalar")
    for name, weight in (("weight1", weight1), ("weight2", weight2), ("weight_gate", weight_gate)):
        if weight is not None or name != "weight_gate":
            check_like("ffn", name, weight, "input", input)
            assert weight is not None
            if weight.dim() != 2:
                raise ValueError(f"ffn: {name} must be a matrix in nn.Linear's layout, got {describe(weight)}")
    features = weight1.shape[0]
    check_shape("ffn", "weight1", weight1, (features, input.shape[-1]), "[F,E]")
    check_shape("ffn", "weight2", weight2, (weight2.shape[0], features), "[O,F]")
    if weight_gate is not None:
        check_shape("ffn", "weight_gate", weight_gate, (features, input.shape[-1]), "[F,E]")
    elif bias_gate is not None:
        raise ValueError("ffn: bias_gate was given without weight_gate")
    for name, bias, size in (
        ("bias1", bias1, features),
        ("bias2", bias2, weight2.shape[0]),
        ("bias_gate", bias_gate, features),
    ):
        if bias is not None:
            check_parameter("ffn", name, bias, size, input)
            check_like("ffn", name, bias, "input", input)
