"""How the adapters hand tensors to the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_UNSIGNED_64 = 2**64 - 1


def unsupported_dtype(x: Tensor) -> str | None:
    """Why no CPU kernel takes a tensor of this dtype, or None."""
    return None if x.dtype in DTYPES else f"it takes float32, float16 and bfloat16, not {x.dtype}"


def philox_key(rng: Tensor | None) -> tuple[int, int]:
    """Seed and offset as the unsigned integers that the kernels take."""
    if rng is None:
        return 0, 0
    seed, offset = rng.tolist()
    return seed & _UNSIGNED_64, offset & _UNSIGNED_64
