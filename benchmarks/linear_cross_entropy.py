"""linear_cross_entropy against ``F.cross_entropy`` of ``F.linear``, with a vocabulary cut to a CPU's patience."""

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
        yield case(direction, torch.float32, 256, 384, 8192)


def case(direction: str, dtype: torch.dtype, N: int, E: int, V: int) -> Case:
    """The mean loss of N rows of width E over V classes."""
    forward = direction == "fwd"
    once = (N * E + V * E) * dtype.itemsize
    return Case(
        op="linear_cross_entropy",
        direction=direction,
        dtype=dtype_name(dtype),
        shape=f"{N}x{E}, V={V}",
        operations=2 * N * E * V * (1 if forward else 2),
        bytes=once * (1 if forward else 2),
        build=partial(build, direction, dtype, N, E, V),
    )


def build(direction: str, dtype: torch.dtype, N: int, E: int, V: int) -> Problem:
    """The tensors and both providers."""
    tensors: dict[str, Tensor | None] = {
        "input": draw(N, E, dtype=dtype),
        "linear_weight": draw(V, E, dtype=dtype, scale=E**-0.5, seed=1),
        "target": torch.randint(V, (N,), generator=torch.Generator().manual_seed(2)),
    }

    def peer(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(input, linear_weight), target)

    problem = OpProblem("linear_cross_entropy", tensors, {}, peer)
    return problem.forward() if direction == "fwd" else problem.backward()
