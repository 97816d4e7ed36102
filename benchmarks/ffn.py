"""ffn against ``F.linear``, the activation, ``F.linear``, at the sizes of the named models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.benchmarks._case import Case, Problem, draw, dtype_name
from pytransformer.benchmarks._models import BERT_BASE, GPT2, LLAMA_3_8B, TRANSFORMER_BASE, Model
from pytransformer.benchmarks._op_problem import OpProblem

CHECKED_ROWS = 32
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
FORWARD = (
    (BERT_BASE, 128), (BERT_BASE, 512), (TRANSFORMER_BASE, 1024), (GPT2, 512), (LLAMA_3_8B, 16)
)  # fmt: skip
IN_16_BITS = (LLAMA_3_8B,)  # whose weights in float32 are 700 MB
BACKWARD = (BERT_BASE, 512)


def cases(device: str = "cpu") -> Iterator[Case]:
    """Forward over models and rows; backward, and both together, where it is trained."""
    for dtype in (torch.float32, torch.bfloat16):
        for model, M in FORWARD:
            if dtype == torch.bfloat16 or model not in IN_16_BITS:
                yield case("fwd", dtype, model, M, device=device)
        for direction in ("bwd", "fwd+bwd"):
            yield case(direction, dtype, *BACKWARD, device=device)


def case(direction: str, dtype: torch.dtype, model: Model, M: int, device: str = "cpu", **more: Any) -> Case:
    """M rows through the hidden layer of a model."""
    E, hidden = model.width, model.hidden
    matrices = 3 if model.gated else 2
    weights, rows = matrices * E * hidden, M * E
    forward = weights + 2 * rows  # the weights, input and output
    backward = 2 * weights + 3 * rows + M * hidden  # gradients of input and weights too, and the hidden
    promised = direction == "fwd" and dtype == torch.float32 and (model, M) == (BERT_BASE, 512)
    settings = {"targets": {"torch": 1.0} if promised else {}, **more}
    return Case(
        op="ffn",
        direction=direction,
        dtype=dtype_name(dtype),
        shape=f"{model.name} {M}" + (" gated" if model.gated else ""),
        operations=2 * matrices * M * E * hidden * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[direction],
        bytes=dtype.itemsize * {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[direction],
        build=partial(build, direction, dtype, model, M, device),
        sizes={"M": M, "E": E, "F": hidden, "activation": model.activation},
        device=device,
        short=(model, M) == (BERT_BASE, 512) and (direction == "fwd" or (direction, dtype) == ("bwd", torch.float32)),
        **settings,
    )


def build(direction: str, dtype: torch.dtype, model: Model, M: int, device: str) -> Problem:
    """The tensors and both providers."""
    E, hidden = model.width, model.hidden
    make = partial(draw, dtype=dtype, device=device)
    tensors: dict[str, Tensor | None] = {
        "input": make(M, E),
        "weight1": make(hidden, E, scale=E**-0.5, seed=1),
        "bias1": None if model.gated else make(hidden, scale=0.1, seed=2),
        "weight2": make(E, hidden, scale=hidden**-0.5, seed=3),
        "bias2": None if model.gated else make(E, scale=0.1, seed=4),
    }
    if model.gated:
        tensors["weight_gate"] = make(hidden, E, scale=E**-0.5, seed=5)
    activation = ACTIVATIONS[model.activation]

    def peer(
        input: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        weight_gate: Tensor | None = None,
    ) -> Tensor:
        inner = activation(F.linear(input, weight1, bias1))
        if weight_gate is not None:
            inner = inner * F.linear(input, weight_gate)
        return F.linear(inner, weight2, bias2)

    weights = tuple(name for name, x in tensors.items() if name != "input" and x is not None)
    options = {"activation": model.activation}
    sampled = dict.fromkeys(("input", "output"), (CHECKED_ROWS,)) if direction == "fwd" else {}
    return OpProblem("ffn", direction, tensors, options, peer, weights, sampled).problem()
