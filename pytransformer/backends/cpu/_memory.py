"""Memory for the results of the CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pytransformer import _cpu


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """``torch.empty``; in huge pages where the memory is sure to be fresh (csrc/include/huge_pages.h)."""
    x = torch.empty(shape, dtype=dtype)
    if x.nbytes >= _cpu.ALWAYS_FRESH:
        _cpu.use_huge_pages(x)
    return x
