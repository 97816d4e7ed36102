"""How the adapters hand tensors to the kernels."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_UNSIGNED_64 = 2**64 - 1


def unsupported_dtype(x: Tensor) -> str | None:
    """Why no CPU kernel takes a tensor of this dtype, or None."""
    return None if x.dtype in DTYPES else f"it takes float32, float16 and bfloat16, not {x.dtype}"


@overload
def rows(x: Tensor) -> Tensor: ...
@overload
def rows(x: Tensor | None) -> Tensor | None: ...
def rows(x: Tensor | None) -> Tensor | None:
    """[..., E] as contiguous [rows, E], without a copy where the memory allows it."""
    if x is None or (x.dim() == 2 and x.is_contiguous()):
        return x
    return x.contiguous().view(-1, x.shape[-1])


@overload
def contiguous(x: Tensor) -> Tensor: ...
@overload
def contiguous(x: Tensor | None) -> Tensor | None: ...
def contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


def philox_key(rng: Tensor | None) -> tuple[int, int]:
    """Seed and offset as the unsigned integers that the kernels take."""
    if rng is None:
        return 0, 0
    seed, offset = rng.tolist()
    return seed & _UNSIGNED_64, offset & _UNSIGNED_64
