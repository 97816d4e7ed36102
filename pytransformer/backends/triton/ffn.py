"""ffn by ``kernels/ffn.py`` and, where there is nothing to fuse, torch's matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.backends._arguments import contiguous, rows, unsupported_dtype
from pytransformer.kernels import ffn as kernels


def why_not(input: Tensor, *rest: object) -> str | None:
    return unsupported_dtype(input)


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
    lead = input.shape[:-1]
    hidden, activated = kernels.hidden_fwd(
        rows(input),
        contiguous(weight1),
        contiguous(bias1),
        contiguous(weight_gate),
        contiguous(bias_gate),
        rng,
        activation,
        dropout_p,
        store_hidden,
    )
    output = F.linear(activated, weight2, bias2).view(*lead, weight2.shape[0])
    return output, input.new_empty(0) if hidden is None else hidden.view(*lead, weight1.shape[0])


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
    """Gradients of the seven tensors from ``input`` to ``bias_gate``; the gate is computed again."""
    needs_input, needs_weight1, needs_bias1, needs_weight2, needs_bias2, needs_weight_gate, needs_bias_gate = needs
    dy, x = rows(grad_output), rows(input)
    gate = None if weight_gate is None else F.linear(x, weight_gate, bias_gate)
    activated, grad_hidden, grad_gate, grad_bias1 = kernels.hidden_bwd(
        dy, contiguous(weight2), rows(hidden), gate, rng, activation, dropout_p
    )
    empty = input.new_empty(0)
    found = [empty] * 7
    if needs_input:
        found[0] = grad_hidden @ weight1
        if weight_gate is not None:
            found[0] = torch.addmm(found[0], grad_gate, weight_gate)
        found[0] = found[0].view(input.shape)
    if needs_weight1:
        found[1] = grad_hidden.mT @ x
    if needs_bias1:
        found[2] = grad_bias1.to(input.dtype)
    if needs_weight2:
        found[3] = dy.mT @ activated
    if needs_bias2:
        found[4] = _column_sums(dy)
    if needs_weight_gate:
        found[5] = grad_gate.mT @ x
    if needs_bias_gate:
        found[6] = _column_sums(grad_gate)
    return tuple(empty.clone() if x is empty else x for x in found)


def _column_sums(x: Tensor) -> Tensor:
    return x.sum(0, dtype=torch.float32).to(x.dtype)
