"""The position-wise feed-forward network in plain PyTorch: the definition of the op.

    output = dropout(activation(input weight1^T + bias1)) weight2^T + bias2
    gated:   dropout(activation(input weight1^T + bias1) * (input weight_gate^T + bias_gate)) weight2^T + bias2

Sources: Vaswani et al., "Attention Is All You Need", 2017, eq. 2; Hendrycks and Gimpel, "Gaussian Error Linear
Units", 2016; Shazeer, "GLU Variants Improve Transformer", 2020, eq. 5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pytransformer.reference._autodiff import or_empty, vjp
from pytransformer.reference._philox import dropout_multiplier

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def ffn(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    weight_gate: Tensor | None,
    bias_gate: Tensor | None,
    rng: Tensor | None,
    activation: str,
    dropout_p: float,
) -> Tensor:
    """``output`` [..., O], differentiable."""
    hidden = ACTIVATIONS[activation](F.linear(input, weight1, bias1))
    if weight_gate is not None:
        hidden = hidden * F.linear(input, weight_gate, bias_gate)
    if dropout_p > 0:
        assert rng is not None
        hidden = hidden * dropout_multiplier(hidden.shape, rng, dropout_p, hidden.dtype)
    return F.linear(hidden, weight2, bias2)


def why_not(*args: object) -> str | None:
    return None


def ffn_fwd(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    weight_gate: Tensor | None,
    bias_gate: Tensor | None,
    rng: Tensor | None,
    activation: str,
    dropout_p: float,
    store_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """``(output, hidden)``: hidden is the value before the activation, empty unless ``store_hidden``."""
    args = (input, weight1, bias1, weight2, bias2, weight_gate, bias_gate, rng, activation, dropout_p)
    return ffn(*args), F.linear(input, weight1, bias1) if store_hidden else input.new_empty(0)


def ffn_bwd(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    weight_gate: Tensor | None,
    bias_gate: Tensor | None,
    hidden: Tensor,
    rng: Tensor | None,
    activation: str,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of the seven tensors from ``input`` to ``bias_gate``; empty where ``needs`` says no."""

    def forward(*tensors: Any) -> tuple[Tensor]:
        x, w1, b1, w2, b2, wg, bg = tensors
        return (ffn(x, w1, b1, w2, b2, wg, bg, rng, activation, dropout_p),)

    tensors = (input, weight1, bias1, weight2, bias2, weight_gate, bias_gate)
    grads = vjp(forward, tensors, (grad_output,))
    return tuple(or_empty(g if n else None, input) for g, n in zip(grads, needs, strict=True))
