"""embedding of tokens and positions against the sum of eager lookups, at the sizes of BERT-base."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.benchmarks._case import Case, OpProblem, Problem, draw, dtype_name


def cases() -> Iterator[Case]:
    """Forward and backward of one batch."""
    for direction in ("fwd", "bwd"):
        yield case(direction, torch.float32, 8, 512, 768, 30522)


def case(direction: str, dtype: torch.dtype, B: int, T: int, E: int, V: int) -> Case:
    """B sequences of T tokens from a table of V rows."""
    rows = B * T * E
    moved = 2 * rows + T * E if direction == "fwd" else rows + V * E + T * E
    return Case(
        op="embedding",
        direction=direction,
        dtype=dtype_name(dtype),
        shape=f"{B}x{T}x{E}",
        operations=rows,
        bytes=moved * dtype.itemsize,
        build=partial(build, direction, dtype, B, T, E, V),
        short=direction == "fwd",
    )


def build(direction: str, dtype: torch.dtype, B: int, T: int, E: int, V: int) -> Problem:
    """The tensors and both providers."""
    tensors: dict[str, Tensor | None] = {
        "tokens": torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1)),
        "weight": draw(V, E, dtype=dtype),
        "positions": draw(T, E, dtype=dtype, seed=2),
    }

    def peer(tokens: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
        return F.embedding(tokens, weight) + positions

    problem = OpProblem("embedding", tensors, {}, peer)
    return problem.forward() if direction == "fwd" else problem.backward()
