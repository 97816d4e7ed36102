"""How the adapters hand tensors to the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported_dtype(x: Tensor) -> str | None:
    """Why no Triton kernel takes a tensor of this dtype, or None."""
    return None if x.dtype in DTYPES else f"it takes float32, float16 and bfloat16, not {x.dtype}"
