"""embedding of tokens and positions against the sum of eager lookups."""

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

CHECKED_SEQUENCES = 2


def cases(device: str = "cpu") -> Iterator[Case]:
    """Forward, backward and both, of one batch."""
    for direction in ("fwd", "bwd", "fwd+bwd"):
        yield case(direction, torch.float32, BERT_BASE, 8, 512, device=device)
    yield case("fwd", torch.bfloat16, TRANSFORMER_BASE, 32, 128, device=device)


def case(direction: str, dtype: torch.dtype, model: Model, B: int, T: int, device: str = "cpu", **more: Any) -> Case:
    """B sequences of T tokens."""
    E, V = model.width, model.vocabulary
    rows = B * T * E
    forward, backward = 2 * rows + T * E, rows + V * E + T * E
    return Case(
        op="embedding",
        direction=direction,
        dtype=dtype_name(dtype),
        shape=f"{model.name} {B}x{T}",
        operations=rows * (2 if direction == "fwd+bwd" else 1),
        bytes=dtype.itemsize * {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[direction],
        build=partial(build, direction, dtype, model, B, T, device),
        sizes={"B": B, "T": T, "E": E, "V": V},
        device=device,
        short=direction == "fwd" and model == BERT_BASE,
        **more,
    )


def build(direction: str, dtype: torch.dtype, model: Model, B: int, T: int, device: str) -> Problem:
    """The tensors and both providers."""
    E, V = model.width, model.vocabulary
    tensors: dict[str, Tensor | None] = {
        "tokens": torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1)).to(device),
        "weight": draw(V, E, dtype=dtype, device=device),
        "positions": draw(T, E, dtype=dtype, seed=2, device=device),
    }

    def peer(tokens: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
        return F.embedding(tokens, weight) + positions

    sampled = dict.fromkeys(("tokens", "output"), (CHECKED_SEQUENCES,)) if direction == "fwd" else {}
    return OpProblem("embedding", direction, tensors, {}, peer, ("weight", "positions"), sampled).problem()
