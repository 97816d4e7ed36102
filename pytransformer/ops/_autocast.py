"""Autocast, said once: what an op casts its tensors to before a backend sees them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_off(device_type: str) -> bool:
    return device_type == "meta" or not torch.is_autocast_enabled(device_type)  # torch refuses to tell of meta


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    return nullcontext() if autocast_off(device_type) else torch.autocast(device_type, enabled=False)


def cast_to(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating tensors in ``dtype``; float64 is left alone, as autocast leaves it."""
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )
