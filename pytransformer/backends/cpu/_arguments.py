"""How the adapters hand tensors to the kernels."""

from __future__ import annotations

from torch import Tensor

_UNSIGNED_64 = 2**64 - 1


def philox_key(rng: Tensor | None) -> tuple[int, int]:
    """Seed and offset as the unsigned integers that the kernels take."""
    if rng is None:
        return 0, 0
    seed, offset = rng.tolist()
    return seed & _UNSIGNED_64, offset & _UNSIGNED_64
