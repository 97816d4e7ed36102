"""Philox4x32-7 in PyTorch: the random bits of every dropout, the same on every backend.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Seven rounds are the fewest
that pass all of TestU01's tests there. A block of four 32-bit words is eight of 16 bits, the low half of each
word first. Element e (its index in the contiguous order of the tensor's logical shape) owns number e % 8 of the block
with counter (e // 8, offset) and key ``seed``, and is kept iff that is at least round(p * 2**16).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ROUNDS = 7
_WORD = 0xFFFFFFFF


def dropout_multiplier(shape: Sequence[int], rng: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """1 / (1 - p) where an element is kept and 0 where it is dropped; ``rng`` is int64 (seed, offset).

    ``p`` counts in steps of 2**-16, here as there: what is kept is scaled by what is in fact dropped.
    """
    count, dropped = math.prod(shape), int(p * 2**16 + 0.5)
    if dropped == 2**16:
        return torch.zeros(tuple(shape), dtype=dtype, device=rng.device)
    words = philox(torch.arange((count + 7) // 8, device=rng.device), rng)
    numbers = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1)[:count]
    return ((numbers >= dropped).to(dtype) / (1 - dropped / 2**16)).reshape(tuple(shape))


def philox(block: Tensor, rng: Tensor) -> Tensor:
    """The four 32-bit words of each block, int64 [..., 4]."""
    seed, offset = rng[0], rng[1]
    c0, c1 = block & _WORD, (block >> 32) & _WORD
    c2, c3 = (offset & _WORD).expand_as(block), ((offset >> 32) & _WORD).expand_as(block)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(_ROUNDS):
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
