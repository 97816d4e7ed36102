"""The matrix units of some processors, Intel's AMX: which of them torch multiplies with, and which the CPU kernels do.

A unit does eight times what the same core's AVX512-BF16 does. The kernels know it for bfloat16; what of float16 torch
multiplies with AMX-FP16 is left to torch. (No processor that has it was at hand: that torch is faster there is
arithmetic, not a measurement.)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from pytransformer import _cpu
from pytransformer.backends._tracing import constant_when_traced

_UNITS = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}
FEW_ROWS = 32  # which wait for the weight to be read, whatever multiplies them


def faster_in_torch(input: torch.Tensor) -> tuple[str, str] | None:
    """What ``yields_to`` answers of products with the rows of ``input`` [..., E] because torch has a unit for them."""
    if not torch_alone_has_unit(input.dtype):
        return None
    # A graph must not hang on how many rows there are.
    if not torch.compiler.is_compiling() and input.numel() // input.shape[-1] <= FEW_ROWS:
        return None
    return "reference", f"in {input.dtype} torch multiplies with this processor's AMX unit, which no kernel in use does"


@constant_when_traced
def torch_alone_has_unit(dtype: torch.dtype) -> bool:
    return dtype in _UNITS and bool(_capabilities().get(_UNITS[dtype])) and not kernels_have_unit(dtype)


@constant_when_traced
def kernels_have_unit(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and _cpu.isa().startswith("amx_bf16")


@cache
def _capabilities() -> Mapping[str, object]:
    return torch.cpu.get_capabilities()
