"""What a call costs the host: every op at a size whose arithmetic is nothing, forward and in training."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pytransformer.benchmarks import attention, embedding, ffn, layer_norm, linear_cross_entropy
from pytransformer.benchmarks._case import Case
from pytransformer.benchmarks._models import Model

TINY = Model("tiny", 1, 64, 64, 64)


def cases() -> Iterator[Case]:
    """Each op, of four rows of 64 numbers."""
    for direction in ("fwd", "fwd+bwd"):
        yield attention.case(direction, torch.float32, TINY, 1, 4)
        yield layer_norm.case(direction, torch.float32, TINY, 4)
        yield ffn.case(direction, torch.float32, TINY, 4)
        yield linear_cross_entropy.case(direction, torch.float32, TINY, 4)
        yield embedding.case(direction, torch.float32, TINY, 1, 4)
