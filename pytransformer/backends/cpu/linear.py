"""linear by ``csrc/cpu/linear.cpp``, left to torch where its own product is faster.

What torch multiplies without an instruction for the type, it multiplies slowly: float16 everywhere, and bfloat16 on
processors without AVX512-BF16. The kernel takes a quarter of torch's time in float16, and half (AVX-512) to a quarter
(AVX2) in bfloat16; the backward a fortieth in float16, and in bfloat16 on AVX2. Only one row and a weight that no cache
holds torch reads at the memory's full speed. Where torch has the instruction, the forward takes 0.5 to 0.9 times the
time of torch's of up to 256 rows and 0.8 to 1.02 of more, in float32 and bfloat16; in bfloat16 with few features and
thousands of rows 1.0 to 1.3, for the input is packed and hardly used. The backward takes 0.5 to 1.0 of it, and 1.0 to
1.1 of some ten rows on one thread; of one row in float32, which torch does not pack a weight for, 1.0 to 2. Measured on
a Zen 4 with one and two threads, torch's and our instructions held to those of the lesser processors.

Where both multiply with AMX, the forward takes 0.4 times the time of torch's of one row, 0.6 to 0.9 of up to 128, 0.6
to 1.0 of up to 1024, and 1.1 to 1.3 of more; the backward 0.7 to 1.25. There, where torch has MKL at its best, the
forward in float32 takes 1.0 to 1.4 times torch's time of up to four rows, the longer the smaller the weight, 0.4 of
eight, 0.8 of 32 and 1.0 to 1.05 of hundreds (a Xeon, one and two threads).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer import _cpu
from pytransformer.backends._arguments import contiguous, rows, unsupported_dtype
from pytransformer.backends._tracing import constant_when_traced
from pytransformer.backends.cpu._matrix_units import faster_in_torch, kernels_have_unit, torch_alone_has_unit
from pytransformer.backends.cpu._memory import empty

FEW_FEATURES = 255  # in bfloat16 with an instruction for it: torch takes them of more than MANY_ROWS
MANY_ROWS = 1024  # beyond, in bfloat16 with AMX, torch takes those of any number of features
CACHED = 2**23  # elements
_WITHOUT_BFLOAT16 = ("scalar", "avx2", "avx512")


def why_not(input: Tensor, *rest: object) -> str | None:
    return unsupported_dtype(input)


def yields_to(input: Tensor, weight: Tensor, *rest: object) -> tuple[str, str] | None:
    if (found := faster_in_torch(input)) is not None:
        return found
    slow, features = _slow_in_torch(input.dtype), weight.shape[0]
    narrow = not slow and input.dtype == torch.bfloat16 and features <= FEW_FEATURES
    if torch.compiler.is_compiling():  # a graph must not hang on how many rows there are
        return ("reference", "of few features in bfloat16 torch's own product is faster") if narrow else None
    count = input.numel() // input.shape[-1]
    if slow and count == 1 and weight.numel() > CACHED:
        size = f"{input.dtype} and a weight of {weight.numel()} elements"
        return "reference", f"of one row in {size} torch's own product is faster"
    if (narrow or kernels_have_unit(input.dtype)) and count > MANY_ROWS:
        which = "by AMX" if not narrow else f"and at most {FEW_FEATURES} features"
        size = f"more than {MANY_ROWS} rows in bfloat16 {which}"
        return "reference", f"of {size} torch's own product is faster ({count} rows, {features} features)"
    return None


@constant_when_traced
def _slow_in_torch(dtype: torch.dtype) -> bool:
    return dtype == torch.float16 or (dtype == torch.bfloat16 and _cpu.isa() in _WITHOUT_BFLOAT16)


def linear_fwd(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    output, _ = linear_inference(input, weight, bias)
    return output, empty((0,), input.dtype)


def linear_inference(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
    output = empty((*input.shape[:-1], weight.shape[0]), input.dtype)
    _cpu.linear_fwd(contiguous(input), contiguous(weight), contiguous(bias), output, None)
    return output, None


def linear_bwd(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:
    needs_input, needs_weight, needs_bias = needs
    one_row = input.numel() == input.shape[-1]
    if torch_alone_has_unit(input.dtype) or (one_row and input.dtype == torch.float32):
        return _by_torch(rows(grad_output), input, weight, needs)
    grad_input = empty(input.shape if needs_input else (0,), input.dtype)
    grad_weight = empty(weight.shape if needs_weight else (0,), weight.dtype)
    grad_bias = empty(weight.shape[:1] if needs_bias else (0,))
    _cpu.linear_bwd(
        contiguous(grad_output),
        contiguous(input),
        contiguous(weight),
        grad_input if needs_input else None,
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
