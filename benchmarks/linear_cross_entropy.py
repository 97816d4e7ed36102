"""linear_cross_entropy against ``F.cross_entropy`` of ``F.linear``, rows cut to a CPU's patience.

No suite lists the backward alone: the gradients are formed in the forward, and it would time a scaling.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.benchmarks._case import Case, Problem, draw, dtype_name
from pytransformer.benchmarks._models import TRANSFORMER_BASE, Model
from pytransformer.benchmarks._op_problem import OpProblem

MINILM = Model("MiniLM", 12, 32, 1536, 8192)  # the vocabulary cut: the short row
ROWS = ((MINILM, 256), (TRANSFORMER_BASE, 64))


def cases(device: str = "cpu") -> Iterator[Case]:
    """Forward, and forward with backward, of one batch for each vocabulary."""
    for dtype in (torch.float32, torch.bfloat16):
        for direction in ("fwd", "fwd+bwd"):
            for model, N in ROWS if direction == "fwd+bwd" else ROWS[:1]:
                yield case(direction, dtype, model, N, device=device)


def case(direction: str, dtype: torch.dtype, model: Model, N: int, device: str = "cpu", **more: Any) -> Case:
    """The mean loss of N rows over the vocabulary."""
    E, V = model.width, model.vocabulary
    once = (N * E + V * E) * dtype.itemsize
    return Case(
        op="linear_cross_entropy",
        direction=direction,
        dtype=dtype_name(dtype),
        shape=f"{model.name} {N}, V={V}",
        operations=2 * N * E * V * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[direction],
        bytes=once * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[direction],
        build=partial(build, direction, dtype, model, N, device),
        sizes={"N": N, "E": E, "V": V},
        device=device,
        short=model is MINILM and dtype == torch.float32,
        **more,
    )


def build(direction: str, dtype: torch.dtype, model: Model, N: int, device: str) -> Problem:
    """The tensors and both providers."""
    E, V = model.width, model.vocabulary
    tensors: dict[str, Tensor | None] = {
        "input": draw(N, E, dtype=dtype, device=device),
        "linear_weight": draw(V, E, dtype=dtype, scale=E**-0.5, seed=1, device=device),
        "target": torch.randint(V, (N,), generator=torch.Generator().manual_seed(2)).to(device),
    }

    def peer(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(input, linear_weight), target)

    return OpProblem("linear_cross_entropy", direction, tensors, {}, peer, ("linear_weight",)).problem()
