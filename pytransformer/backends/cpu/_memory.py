"""Memory for the results of the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from pytransformer import _cpu

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """``torch.empty``; what is large in memory that earlier results have left (csrc/include/large_memory.h)."""
    if prod(shape) * dtype.itemsize < _cpu.LARGE or _is_to_be_filled():
        return torch.empty(shape, dtype=dtype)
    return _cpu.empty(shape, _NAMES[dtype])


def _is_to_be_filled() -> bool:
    """Does ``torch.empty`` fill what it returns?"""
    fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return fills and torch.are_deterministic_algorithms_enabled()
