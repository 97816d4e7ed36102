"""Windows: their one check, and bands that lie elsewhere in every sequence of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_window(op: str, window: Any, sides: int = 2) -> tuple[int | None, int | None]:
    """(left, right), None for an open side, of one number, a pair of ``sides`` = 2, or None.

    Raises:
        ValueError: a side is neither None nor a non-negative integer.
    """
    pair = isinstance(window, tuple) and len(window) == 2 and sides == 2
    left, right = window if pair else (window, window)
    for side in (left, right):
        if side is not None and (isinstance(side, bool) or not isinstance(side, int) or side < 0):
            or_pair = ", a pair of them" if sides == 2 else ""
            raise ValueError(f"{op}: window must be a non-negative integer{or_pair} or None, got {window!r}")
    return left, right


def shifted_band(shift: Tensor, T: int, S: int, left: int | None, right: int | None) -> Tensor:
    """bool [B,1,T,S]: query t of sequence b stands at key t + shift[b], and sees ``left`` keys before it and ``right``
    after it; all of a side that is None."""
    at = torch.arange(T, device=shift.device)[:, None] + shift[:, None, None, None]
    distance = torch.arange(S, device=shift.device) - at
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        seen &= distance >= -left
    return seen if right is None else seen & (distance <= right)
