"""Philox4x32-10 in PyTorch: the random bits of every dropout, the same on every backend.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
Element e (its index in the contiguous order of the tensor's logical shape) owns word e % 4 of the block
with counter (e // 4, offset) and key ``seed``; it is kept iff the word is at least round(p * 2**32).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def dropout_multiplier(shape: Sequence[int], rng: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """1 / (1 - p) where an element is kept and 0 where it is dropped; ``rng`` is int64 (seed, offset)."""
    count = math.prod(shape)
    words = philox(torch.arange((count + 3) // 4, device=rng.device), rng).reshape(-1)[:count]
    if p >= 1:
        return torch.zeros(tuple(shape), dtype=dtype, device=rng.device)
    keep = words >= int(p * 2**32 + 0.5)
    return (keep.to(dtype) / (1 - p)).reshape(tuple(shape))


def philox(block: Tensor, rng: Tensor) -> Tensor:
    """The four 32-bit words of each block, int64 [..., 4]."""
    seed, offset = rng[0], rng[1]
    c0, c1 = block & _WORD, (block >> 32) & _WORD
    c2, c3 = (offset & _WORD).expand_as(block), ((offset >> 32) & _WORD).expand_as(block)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # A 32 x 32 bit product wraps in int64 without losing a bit; the mask undoes the sign extension.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)
