"""layer_norm with the residual added, as after every sublayer of a Transformer, against eager torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.benchmarks._case import Case, OpProblem, Problem, draw, dtype_name

OPERATIONS = {"fwd": 9, "bwd": 14}  # for each element: the sum, two reductions, the affine map
TENSORS = {"fwd": 3, "bwd": 3}  # input, residual, output; gradient, sum, and one gradient that both inputs share


def cases() -> Iterator[Case]:
    """BERT-base's rows, forward and backward."""
    for direction in ("fwd", "bwd"):
        for dtype in (torch.bfloat16, torch.float32):
            yield case(direction, dtype, 4096, 768)


def case(direction: str, dtype: torch.dtype, N: int, E: int) -> Case:
    """``layer_norm(input + residual)`` of N rows."""
    return Case(
        op="layer_norm",
        direction=direction,
        dtype=dtype_name(dtype),
        shape=f"{N}x{E} residual",
        operations=OPERATIONS[direction] * N * E,
        bytes=TENSORS[direction] * N * E * dtype.itemsize,
        build=partial(build, direction, dtype, N, E),
        target=2.0 if direction == "fwd" and dtype == torch.bfloat16 else None,
    )


def build(direction: str, dtype: torch.dtype, N: int, E: int) -> Problem:
    """The tensors and both providers."""
    tensors: dict[str, Tensor | None] = {
        "input": draw(N, E, dtype=dtype),
        "weight": draw(E, dtype=dtype, seed=1),
        "bias": draw(E, dtype=dtype, seed=2),
        "residual": draw(N, E, dtype=dtype, seed=3),
    }

    def peer(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.layer_norm(input + residual, (E,), weight, bias)

    problem = OpProblem("layer_norm", tensors, {}, peer)
    return problem.forward() if direction == "fwd" else problem.backward()
