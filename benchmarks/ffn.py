"""ffn against ``F.linear``, ``F.gelu``, ``F.linear``, at the sizes of BERT-base."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.benchmarks._case import Case, OpProblem, Problem, draw, dtype_name

CHECKED_ROWS = 64


def cases() -> Iterator[Case]:
    """Forward over the number of rows, backward at 1024."""
    for dtype in (torch.float32, torch.bfloat16):
        for M in (128, 1024, 4096):
            yield case("fwd", dtype, M, 768, 3072)
        yield case("bwd", dtype, 1024, 768, 3072)


def case(direction: str, dtype: torch.dtype, M: int, E: int, F: int) -> Case:
    """M rows of width E through a hidden layer of width F, with gelu."""
    forward = direction == "fwd"
    weights, rows = 2 * E * F + E + F, M * E
    return Case(
        op="ffn",
        direction=direction,
        dtype=dtype_name(dtype),
        shape=f"{M}x{E}x{F} gelu",
        operations=2 * (2 * M * E * F) * (1 if forward else 2),
        # input, weights, output; in the backward also the gradients of input and weights, and the hidden
        bytes=dtype.itemsize * (weights + 2 * rows if forward else 2 * weights + 3 * rows + M * F),
        build=partial(build, direction, dtype, M, E, F),
        target=1.0 if forward and dtype == torch.float32 else None,
        short=M == 1024 and (dtype == torch.float32 or forward),
    )


def build(direction: str, dtype: torch.dtype, M: int, E: int, hidden: int) -> Problem:
    """The tensors and both providers."""
    tensors: dict[str, Tensor | None] = {
        "input": draw(M, E, dtype=dtype),
        "weight1": draw(hidden, E, dtype=dtype, scale=E**-0.5, seed=1),
        "bias1": draw(hidden, dtype=dtype, scale=0.1, seed=2),
        "weight2": draw(E, hidden, dtype=dtype, scale=hidden**-0.5, seed=3),
        "bias2": draw(E, dtype=dtype, scale=0.1, seed=4),
    }

    def peer(input: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(input, weight1, bias1)), weight2, bias2)

    options = {"activation": "gelu"}
    if direction == "fwd":
        return OpProblem("ffn", tensors, options, peer, sampled=("input",), count=CHECKED_ROWS).forward()
    return OpProblem("ffn", tensors, options, peer).backward()
