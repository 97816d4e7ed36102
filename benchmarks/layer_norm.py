"""layer_norm and RMSNorm with the residual added, as after every sublayer of a Transformer, against eager torch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.benchmarks._case import Case, Problem, draw, dtype_name
from pytransformer.benchmarks._models import BERT_BASE, BERT_LARGE, LLAMA_3_8B, TRANSFORMER_BASE, Model
from pytransformer.benchmarks._op_problem import OpProblem

OPERATIONS = {"fwd": 9, "bwd": 14, "fwd+bwd": 23}  # for each element: the sum, two reductions, the affine map
# input, residual, output; gradient, sum, and one gradient that both inputs share
TENSORS = {"fwd": 3, "bwd": 3, "fwd+bwd": 6}
EPS = {"layer_norm": 1e-5, "rms_norm": 1e-6}
ROWS = ((TRANSFORMER_BASE, 1024), (BERT_BASE, 4096), (BERT_LARGE, 2048), (LLAMA_3_8B, 512))
BACKWARD = ((BERT_BASE, 4096), (LLAMA_3_8B, 512))


def cases(device: str = "cpu") -> Iterator[Case]:
    """Each model's rows forward and backward; BERT-base's both together."""
    for dtype in (torch.bfloat16, torch.float32):
        for direction in ("fwd", "bwd"):
            for model, N in ROWS if direction == "fwd" else BACKWARD:
                yield case(direction, dtype, model, N, device=device)
        yield case("fwd+bwd", dtype, BERT_BASE, 4096, device=device)


def case(
    direction: str,
    dtype: torch.dtype,
    model: Model,
    N: int,
    device: str = "cpu",
    dropout_p: float = 0.0,
    **more: Any,
) -> Case:
    """The norm of ``dropout(input) + residual``, of N rows."""
    promised = direction == "fwd" and dtype == torch.bfloat16 and model == BERT_BASE and N == 4096
    settings = {"targets": {"torch": 2.0} if promised else {}, **more}
    # with dropout the two inputs have gradients of their own
    tensors = TENSORS[direction] + (1 if dropout_p > 0 and direction != "fwd" else 0)
    return Case(
        op="layer_norm",
        direction=direction,
        dtype=dtype_name(dtype),
        shape=f"{model.name} {N}" + (" RMS" if model.rms else "") + (" dropout" if dropout_p else ""),
        operations=OPERATIONS[direction] * N * model.width,
        bytes=tensors * N * model.width * dtype.itemsize,
        build=partial(build, direction, dtype, model, N, device, dropout_p),
        sizes={"N": N, "E": model.width},
        device=device,
        short=(model, N) == (BERT_BASE, 4096) and direction != "fwd+bwd",
        **settings,
    )


def build(direction: str, dtype: torch.dtype, model: Model, N: int, device: str, dropout_p: float) -> Problem:
    """The tensors and both providers."""
    E = model.width
    tensors: dict[str, Tensor | None] = {
        "input": draw(N, E, dtype=dtype, device=device),
        "weight": draw(E, dtype=dtype, seed=1, device=device),
        "bias": draw(E, dtype=dtype, seed=2, device=device),
        "residual": draw(N, E, dtype=dtype, seed=3, device=device),
    }
    if model.rms:
        del tensors["bias"]

    def layer_norm(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return F.layer_norm(F.dropout(input, dropout_p) + residual, (E,), weight, bias, EPS["layer_norm"])

    def rms_norm(input: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return F.rms_norm(F.dropout(input, dropout_p) + residual, (E,), weight, EPS["rms_norm"])

    op, peer, weights = "layer_norm", layer_norm, ("weight", "bias")
    if model.rms:
        op, peer, weights = "rms_norm", rms_norm, ("weight",)
    seed = torch.tensor([1, 0], device=device)  # there already, for a graph that is captured
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed} if dropout_p else {}
    return OpProblem(op, direction, tensors, options, peer, weights, random=bool(dropout_p)).problem()
