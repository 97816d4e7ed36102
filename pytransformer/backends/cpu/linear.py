"""linear by ``csrc/cpu/linear.cpp``, chosen where that is faster than torch's own product.

Measured on a Zen 4 with two threads: of few rows, which cost what reading the weight costs, the kernel takes 0.2 to 1.0
times the time of torch's; of many it takes 0.9 to 1.15 times in float32 and 1.1 to 1.4 in bfloat16, and the backward
more. In float16, which torch multiplies element by element, it takes a quarter, and the backward a fortieth; but one
row and a weight that no cache holds torch reads at the memory's full speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer import _cpu
from pytransformer.backends._arguments import contiguous, rows, unsupported_dtype
from pytransformer.backends.cpu._memory import empty

MOST_ROWS = {torch.float32: 96, torch.bfloat16: 48}
CACHED = 2**23  # elements


def why_not(input: Tensor, *rest: object) -> str | None:
    return unsupported_dtype(input)


def yields_to(input: Tensor, weight: Tensor, *rest: object) -> tuple[str, str] | None:
    most = MOST_ROWS.get(input.dtype)
    if torch.compiler.is_compiling():  # a graph must not hang on how many rows there are
        return None if most is None else ("reference", f"of many rows in {input.dtype} torch's own product is faster")
    count = input.numel() // input.shape[-1]
    if most is not None and count > most:
        return "reference", f"of more than {most} rows in {input.dtype} torch's own product is faster ({count} rows)"
    if most is None and count == 1 and weight.numel() > CACHED:
        size = f"{input.dtype} and a weight of {weight.numel()} elements"
        return "reference", f"of one row in {size} torch's own product is faster"
    return None


def linear_fwd(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    output = empty((*input.shape[:-1], weight.shape[0]), input.dtype)
    _cpu.linear_fwd(rows(input), contiguous(weight), contiguous(bias), output.view(-1, weight.shape[0]), None)
    return output, empty((0,), input.dtype)


def linear_bwd(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:
    needs_input, needs_weight, needs_bias = needs
    if input.dtype != torch.float16:
        return _by_torch(rows(grad_output), input, weight, needs)
    grad_input = empty(input.shape if needs_input else (0,), input.dtype)
    grad_weight = empty(weight.shape if needs_weight else (0,), weight.dtype)
    grad_bias = empty(weight.shape[:1] if needs_bias else (0,))
    _cpu.linear_bwd(
        rows(grad_output),
        rows(input),
        contiguous(weight),
        grad_input.view(-1, input.shape[-1]) if needs_input else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        None,
    )
    return grad_input, grad_weight, grad_bias.to(input.dtype)


def _by_torch(grad_output: Tensor, input: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    needs_input, needs_weight, needs_bias = needs
    nothing = input.new_empty(0)
    return (
        (grad_output @ weight).view(input.shape) if needs_input else nothing,
        grad_output.mT @ rows(input) if needs_weight else nothing,
        grad_output.sum(0, dtype=torch.float32).to(input.dtype) if needs_bias else nothing,
    )
