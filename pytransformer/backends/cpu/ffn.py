"""ffn by ``csrc/cpu/ffn.cpp``, but for training where products are AMX's.

There the forward alone takes 0.6 to 1.1 times the time of torch's, forward and backward about as long, 0.8 to 1.1: a
product is over so soon that what is packed and turned for the next one counts (a Xeon, one and two threads).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pytransformer import _cpu
from pytransformer.backends._arguments import contiguous, unsupported_dtype
from pytransformer.backends.cpu._matrix_units import faster_in_torch, kernels_have_unit
from pytransformer.backends.cpu._memory import empty


def why_not(input: Tensor, *rest: object) -> str | None:
    return unsupported_dtype(input)


def yields_to(input: Tensor, *rest: object) -> tuple[str, str] | None:
    store_hidden = rest[-1]
    if store_hidden and kernels_have_unit(input.dtype):
        return "reference", f"in training in {input.dtype} torch's own products by AMX are as fast"
    return faster_in_torch(input)


def ffn_fwd(input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    output, hidden = ffn_inference(input, *args)
    return output, input.new_empty(0) if hidden is None else hidden


def ffn_inference(
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
) -> tuple[Tensor, Tensor | None]:
    lead = input.shape[:-1]
    output = empty((*lead, weight2.shape[0]), input.dtype)
    hidden = empty((*lead, weight1.shape[0]), input.dtype) if store_hidden else None
    _cpu.ffn_fwd(
        contiguous(input),
        contiguous(weight1),
        contiguous(bias1),
        contiguous(weight2),
        contiguous(bias2),
        contiguous(weight_gate),
        contiguous(bias_gate),
        activation,
        dropout_p,
        output,
        hidden,
        contiguous(rng),
    )
    return output, hidden


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
    needs_input, needs_weight1, needs_bias1, needs_weight2, needs_bias2, needs_gate, needs_bias_gate = needs
    grad_input = empty(input.shape if needs_input else (0,), input.dtype)
    grad_weight1 = empty(weight1.shape if needs_weight1 else (0,), weight1.dtype)
    grad_weight2 = empty(weight2.shape if needs_weight2 else (0,), weight2.dtype)
    grad_bias1 = empty(weight1.shape[:1] if needs_bias1 else (0,))
    grad_bias2 = empty(weight2.shape[:1] if needs_bias2 else (0,))
    grad_gate = empty(weight1.shape if needs_gate else (0,), weight1.dtype)
    grad_bias_gate = empty(weight1.shape[:1] if needs_bias_gate else (0,))
    _cpu.ffn_bwd(
        contiguous(grad_output),
        contiguous(input),
        contiguous(weight1),
        contiguous(weight2),
        contiguous(weight_gate),
        contiguous(bias_gate),
        contiguous(hidden),
        activation,
        dropout_p,
        grad_input if needs_input else None,
        grad_weight1 if needs_weight1 else None,
        grad_bias1 if needs_bias1 else None,
        grad_weight2 if needs_weight2 else None,
        grad_bias2 if needs_bias2 else None,
        grad_gate if needs_gate else None,
        grad_bias_gate if needs_bias_gate else None,
        contiguous(rng),
    )
    biases = (x.to(input.dtype) for x in (grad_bias1, grad_bias2, grad_bias_gate))
    bias1_grad, bias2_grad, bias_gate_grad = biases
    return grad_input, grad_weight1, bias1_grad, grad_weight2, bias2_grad, grad_gate, bias_gate_grad
