"""What the GPU backends leave to torch: the matrix products around ffn's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ffn_gradients(
    needs: Sequence[bool],
    dy: Tensor,
    x: Tensor,
    weights: tuple[Tensor, Tensor | None],
    activated: Tensor,
    grad_hidden: Tensor,
    grad_gate: Tensor | None,
    grad_bias1: Tensor | None,
    grad_bias_gate: Tensor | None,
) -> list[Tensor]:
    """The gradients of input [N,E], weight1, bias1, weight2, bias2, weight_gate, bias_gate; empty where not needed.

    ``weights`` are weight1 and weight_gate. The biases' gradients come from the kernels, where they are needed.
    """
    weight1, weight_gate = weights
    found = [x.new_empty(0) for _ in needs]
    if needs[0]:
        found[0] = grad_hidden @ weight1
        if grad_gate is not None and weight_gate is not None:
            found[0] = torch.addmm(found[0], grad_gate, weight_gate)
    if needs[1]:
        found[1] = grad_hidden.mT @ x
    if needs[2] and grad_bias1 is not None:
        found[2] = grad_bias1.to(x.dtype)
    if needs[3]:
        found[3] = dy.mT @ activated
    if needs[4]:
        found[4] = column_sums(dy)
    if needs[5] and grad_gate is not None:
        found[5] = grad_gate.mT @ x
    if needs[6] and grad_bias_gate is not None:
        found[6] = grad_bias_gate.to(x.dtype)
    return found


def column_sums(x: Tensor) -> Tensor:
    """In float32, rounded to the dtype of ``x``."""
    return x.sum(0, dtype=torch.float32).to(x.dtype)
