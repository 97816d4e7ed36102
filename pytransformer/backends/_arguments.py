"""How the adapters of every backend shape tensors for the kernels."""

from __future__ import annotations

from typing import overload

from torch import Tensor


@overload
def rows(x: Tensor) -> Tensor: ...
@overload
def rows(x: Tensor | None) -> Tensor | None: ...
def rows(x: Tensor | None) -> Tensor | None:
    """[..., E] as contiguous [rows, E], without a copy where the memory allows it."""
    return None if x is None else x.contiguous().view(-1, x.shape[-1])


@overload
def contiguous(x: Tensor) -> Tensor: ...
@overload
def contiguous(x: Tensor | None) -> Tensor | None: ...
def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
