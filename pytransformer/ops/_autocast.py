"""Autocast, said once: what an op casts its tensors to before a backend sees them."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_off(device_type: str) -> bool:
    return not torch.is_autocast_enabled(device_type)


def cast_to(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating tensors in ``dtype``; float64 is left alone, as autocast leaves it."""
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors
    )
