"""linear against ``F.linear``: the projections of attention at the sizes of the named models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.benchmarks._case import Case, Problem, draw, dtype_name
from pytransformer.benchmarks._models import BERT_BASE, TRANSFORMER_BASE, Model
from pytransformer.benchmarks._op_problem import OpProblem

CHECKED_ROWS = 32
ROWS = ((BERT_BASE, 1), (BERT_BASE, 32), (BERT_BASE, 1024), (TRANSFORMER_BASE, 4))
BACKWARD = (BERT_BASE, 512)
PROJECTIONS = 3  # query, key and value in one


def cases(device: str = "cpu") -> Iterator[Case]:
    """Query, key and value of every model's rows; backward where it is trained."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for model, M in ROWS:
            yield case("fwd", dtype, model, M, device=device)
        yield case("bwd", dtype, *BACKWARD, device=device)


def case(direction: str, dtype: torch.dtype, model: Model, M: int, device: str = "cpu", **more: Any) -> Case:
    """M rows through the projection of query, key and value."""
    E, out = model.width, PROJECTIONS * model.width
    forward, backward = M * E + out * E + M * out, M * out + 2 * (M * E + out * E)
    return Case(
        op="linear",
        direction=direction,
        dtype=dtype_name(dtype),
        shape=f"{model.name} {M} QKV",
        operations=2 * M * E * out * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[direction],
        bytes=dtype.itemsize * {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[direction],
        build=partial(build, direction, dtype, model, M, device),
        sizes={"M": M, "E": E, "O": out},
        device=device,
        **more,
    )


def build(direction: str, dtype: torch.dtype, model: Model, M: int, device: str) -> Problem:
    """The tensors and both providers."""
    E, out = model.width, PROJECTIONS * model.width
    make = partial(draw, dtype=dtype, device=device)
    tensors: dict[str, Tensor | None] = {
        "input": make(M, E),
        "weight": make(out, E, scale=E**-0.5, seed=1),
        "bias": make(out, scale=0.1, seed=2),
    }
    sampled = dict.fromkeys(("input", "output"), (CHECKED_ROWS,)) if direction == "fwd" else {}
    return OpProblem("linear", direction, tensors, {}, F.linear, ("weight", "bias"), sampled).problem()
