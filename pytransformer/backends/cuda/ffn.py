"""ffn by torch's matrix products and ``csrc/cuda/ffn.cu`` between them.

cuBLAS adds the biases in its products. Whether its other epilogues (ReLU with a bit mask, the biases' gradients)
beat the kernels here has not been measured.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import _cuda
from pytransformer.backends._products import ffn_gradients
from pytransformer.backends.cuda._arguments import call, multiprocessors, rows, unsupported

_STRIP = 256  # columns that a block of the backward has in 16 bits; at most, otherwise
_BLOCKS = 4  # of the backward that share a multiprocessor


def why_not(input: Tensor, *rest: object) -> str | None:
    return unsupported(input)


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
    lead, x = input.shape[:-1], rows(input)
    hidden = F.linear(x, weight1, bias1)
    gate = None if weight_gate is None else F.linear(x, weight_gate, bias_gate)
    activated = torch.empty_like(hidden)
    _cuda.ffn_activation_fwd(hidden, gate, activation, dropout_p, activated, call(input, rng))
    output = F.linear(activated, weight2, bias2).view(*lead, weight2.shape[0])
    return output, hidden.view(*lead, weight1.shape[0]) if store_hidden else input.new_empty(0)


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
    dy, x, h = rows(grad_output), rows(input), rows(hidden)
    gate = None if weight_gate is None else F.linear(x, weight_gate, bias_gate)
    activated, grad_hidden = torch.empty_like(h), torch.empty_like(h)
    grad_gate = None if gate is None else torch.empty_like(h)
    grad_bias1, grad_bias_gate = (
        torch.empty(h.shape[1], dtype=torch.float32, device=h.device) if n else None for n in (needs[2], needs[6])
    )
    shares, workspace = _workspace(h)
    _cuda.ffn_activation_bwd(
        rows(dy @ weight2),
        h,
        gate,
        activation,
        dropout_p,
        activated,
        grad_hidden,
        grad_gate,
        grad_bias1,
        grad_bias_gate,
        call(h, rng, workspace, counters=-(-h.shape[1] // 32) * (isqrt(shares) + 2)),
    )
    grad_input, *rest = ffn_gradients(
        needs, dy, x, (weight1, weight_gate), activated, grad_hidden, grad_gate, grad_bias1, grad_bias_gate
    )
    return grad_input.view(input.shape) if needs[0] else grad_input, *rest


def _workspace(h: Tensor) -> tuple[int, Tensor]:
    """Into how many shares the backward cuts the rows, and the memory for their column sums."""
    count, width = h.shape
    strips = -(-width // _STRIP)
    blocks = multiprocessors(h.device.index or 0) * _BLOCKS
    shares = max(min(-(-count // 8), blocks // strips), 1)
    return shares, torch.empty(shares, 2, strips * _STRIP, dtype=torch.float32, device=h.device)
