"""ffn by ``kernels/ffn.py`` and, where there is nothing to fuse, torch's matrix product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pytransformer.backends._arguments import contiguous, rows, unsupported_dtype
from pytransformer.backends._products import column_sums, ffn_gradients
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
    dy, x = rows(grad_output), rows(input)
    gate = None if weight_gate is None else F.linear(x, weight_gate, bias_gate)
    activated, grad_hidden, grad_gate, grad_bias1 = kernels.hidden_bwd(
        dy, contiguous(weight2), rows(hidden), gate, rng, activation, dropout_p
    )
    grad_bias_gate = column_sums(grad_gate) if needs[6] else None
    grad_input, *rest = ffn_gradients(
        needs, dy, x, (weight1, weight_gate), activated, grad_hidden, grad_gate, grad_bias1, grad_bias_gate
    )
    return grad_input.view(input.shape) if needs[0] else grad_input, *rest
