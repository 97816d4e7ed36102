"""The linear layer in plain PyTorch: the definition of the op.

output = input weight^T + bias
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pytransformer.reference._autodiff import or_empty, vjp


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``output`` [..., O], differentiable."""
    return F.linear(input, weight, bias)


def why_not(*args: object) -> str | None:
    return None


def linear_fwd(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return linear(input, weight, bias), input.new_empty(0)


def linear_bwd(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients of input, weight and bias; empty where ``needs`` says no."""

    def forward(*tensors: Any) -> tuple[Tensor]:
        return (linear(*tensors),)

    grads = vjp(forward, (input, weight, bias), (grad_output,))
    return tuple(or_empty(g if n else None, input) for g, n in zip(grads, needs, strict=True))
