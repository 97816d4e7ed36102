"""FeedForward: the position-wise network, and the fused form of any linear-activation-dropout-linear chain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer import ops
from pytransformer.nn._plain import DROPOUT, LINEAR, active_dropout, is_plain

Activation = str | Callable[[Tensor], Tensor]
_BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
_BY_FUNCTION = ((F.relu, "relu"), (torch.relu, "relu"), (F.gelu, "gelu"), (F.silu, "silu"))
ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.SiLU, nn.GELU)
_GELU_KEYWORDS: tuple[tuple[dict[str, str], str], ...] = (
    ({"approximate": "tanh"}, "gelu_tanh"),
    ({"approximate": "none"}, "gelu"),
    ({}, "gelu"),
)


class FeedForward(nn.Module):
    """``y = dropout(activation(x W1^T + b1)) W2^T + b2``; gated: the activated hidden times ``x Wg^T + bg``.

    Args:
        d_model: E, the size of input and output.
        dim_feedforward: F, the size of the hidden.
        activation: ``"relu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"silu"``, or any callable (run unfused).
        dropout: probability of dropping an element of the hidden, in training mode.
        gated: multiply the activated hidden by a second projection (GLU forms), ``linear_gate``.
        bias: give the projections biases.
        device, dtype: of the parameters.

    Shape: input and output [..., E].

    Raises:
        ValueError: the activation's name is unknown.

    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 2; gated forms: Shazeer, 2020, eq. 5.
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        activation: Activation = "relu",
        dropout: float = 0.0,
        gated: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, device=device, dtype=dtype)
        self.linear_gate = nn.Linear(d_model, dim_feedforward, bias=bias, device=device, dtype=dtype) if gated else None
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, device=device, dtype=dtype)
        self.activation = activation_function(activation)

    def forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2, self.linear_gate)


def feed_forward(
    x: Tensor, linear1: Any, activation: Callable[[Tensor], Tensor], dropout: Any, linear2: Any, gate: Any = None
) -> Tensor:
    """``linear2(dropout(activation(linear1(x)) * gate(x)))``: one op where the modules are plain, else one by one."""
    name = activation_name(activation)
    plain = is_plain(dropout, DROPOUT) and is_plain(linear1, LINEAR) and is_plain(linear2, LINEAR)
    if name is None or not plain or not (gate is None or is_plain(gate, LINEAR)):
        hidden = activation(linear1(x))
        return linear2(dropout(hidden if gate is None else hidden * gate(x)))  # type: ignore[no-any-return]
    weight1 = linear1.weight
    if x.dtype != weight1.dtype and torch.is_autocast_enabled(x.device.type):
        x = x.to(weight1.dtype)
    return ops.ffn(
        x,
        weight1,
        linear1.bias,
        linear2.weight,
        linear2.bias,
        name,
        dropout_p=active_dropout(dropout),
        weight_gate=None if gate is None else gate.weight,
        bias_gate=None if gate is None else gate.bias,
    )


def activation_function(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The callable of an activation's name; a callable as it is."""
    if not isinstance(activation, str):
        return activation
    if activation not in _BY_NAME:
        raise ValueError(
            f"activation must be a callable or one of {', '.join(map(repr, _BY_NAME))}; got {activation!r}"
        )
    return _BY_NAME[activation]


def activation_name(activation: Any) -> str | None:
    """What ``ops.ffn`` calls an activation, or None where it does not have it."""
    if isinstance(activation, nn.Module):
        if not is_plain(activation, ACTIVATIONS):
            return None
        if isinstance(activation, nn.GELU):
            return "gelu" if activation.approximate == "none" else "gelu_tanh"
        return "relu" if isinstance(activation, nn.ReLU) else "silu"
    if isinstance(activation, partial) and activation.func is F.gelu and not activation.args:
        return next((name for keywords, name in _GELU_KEYWORDS if activation.keywords == keywords), None)
    return next((name for function, name in _BY_FUNCTION if activation is function), None)
