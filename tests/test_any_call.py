"""Calls that nobody thought of: hypothesis draws sizes, layouts and options of every op, the oracle judges them.

``make test`` runs a few, always the same. ``make fuzz`` runs many, other ones every time, and shrinks what fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from compare import plain
from helpers import DTYPES, check, skip_unless_served
from hypothesis import assume, given
from hypothesis import strategies as st

from pytransformer import backends

FAR = 1e4  # stands where no kernel may read; not NaN, with which torch's own products by AMX mix up rows
LUCK = 8.0  # hypothesis seeks the unluckiest rounding; how kernels round is what the other tests are for
SCORES_CANCEL = ("dquery", "dkey", "dvalue", "dbias")  # where a query sees one key: ``cancelled`` of test_attention.py

some = st.sampled_from
flags = st.booleans()
rows = some([1, 2, 3, 16, 33, 65, 130])
features = some([8, 17, 32, 64, 100])
probabilities = some([0.0, 0.0, 0.3, 1.0])


@dataclass
class Call:
    op: str
    tensors: dict[str, torch.Tensor | None]
    options: dict[str, Any]
    magnitudes: dict[str, float] = field(default_factory=dict)


class Draw:
    """What an example is made of: numbers that hypothesis chooses, and tensors of one dtype in any layout."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.dtype = draw(some(list(DTYPES.values())))
        self.random = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**32)))

    def __call__(self, strategy: Any) -> Any:
        return self.draw(strategy)

    def tensor(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        x = (torch.randn(shape, generator=self.random) * scale).to(self.dtype)
        return self._view(x, FAR)

    def vector(self, size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.random).to(self.dtype)

    def keep(self, *shape: int) -> torch.Tensor:
        return self._view(torch.rand(shape, generator=self.random) < self(some([0.1, 0.6, 0.99])), True)

    def below(self, end: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, end, shape, generator=self.random)

    def _view(self, x: torch.Tensor, between: float) -> torch.Tensor:
        """``x`` in a layout of its own, ``between`` in the memory that it leaves out."""
        layout = self(some(["contiguous", "transposed", "columns", "padded", "spread"]))
        if layout == "contiguous" or x.dim() < 2:
            return x
        if layout == "transposed":
            return x.transpose(0, -2).contiguous().transpose(0, -2)
        if layout == "columns":
            return x.mT.contiguous().mT
        step = 2 if layout == "spread" else 1
        room = x.new_full((*x.shape[:-1], step * x.shape[-1] + 3), between)
        view = room[..., 1 : 1 + step * x.shape[-1] : step]
        return view.copy_(x)


def attention_calls(d: Draw) -> Call:
    B, G, T, S = d(some([1, 2, 3])), d(some([1, 2])), d(rows), d(some([1, 5, 17, 64, 65, 130]))
    H, D, Dv = G * d(some([1, 2, 3])), d(some([8, 20, 32, 64, 72, 128])), d(some([8, 33, 64]))
    tensors = {"query": d.tensor(B, H, T, D), "key": d.tensor(B, G, S, D), "value": d.tensor(B, G, S, Dv)}
    masks = {
        "attn_mask": lambda: d.keep(*d(some([(T, S), (B, 1, 1, S), (B, H, T, S), (1, H, 1, S), (B, 1, T, 1)]))),
        "is_causal": lambda: True,
        "window": lambda: d(some([0, 3, 40, (None, 2), (5, None), (9, 1)])),
        "key_lengths": lambda: d.below(S + 1, B),
    }
    options = {name: make() for name, make in masks.items() if d(flags)}
    options |= {"enable_gqa": True, "causal_align": d(some(["top_left", "bottom_right"]))}
    visible = plain._visible(
        *(tensors["query"], tensors["key"], options.get("attn_mask"), options.get("is_causal", False)),
        *(options.get("window"), options.get("key_lengths"), options["causal_align"]),
    )
    seen = torch.tensor(S) if visible is None else visible.expand(*visible.shape[:-1], S).sum(-1)
    cancelling = dict.fromkeys(SCORES_CANCEL if bool((seen == 1).any()) else (), 16 + 8 * (H * T) ** 0.5)
    if d(flags):
        tensors["bias"] = d.tensor(*d(some([(T, S), (B, H, T, S), (H, 1, S), (B, 1, 1, S)])))
    if d(flags):
        options["softcap"] = d(some([2.0, 30.0]))
    if d(flags):
        options |= {"dropout_p": d(probabilities), "seed": 7}
    return Call("attention", tensors, options, cancelling)


def norm_calls(d: Draw) -> Call:
    op, N, E = d(some(["layer_norm", "rms_norm"])), d(rows), d(some([8, 31, 64, 100, 256, 1000]))
    tensors = {"input": d.tensor(N, E), "weight": d.vector(E)}
    optional = {"bias": lambda: d.vector(E), "residual": lambda: d.tensor(N, E), "input_bias": lambda: d.vector(E)}
    tensors |= {name: make() for name, make in optional.items() if d(flags) and (op, name) != ("rms_norm", "bias")}
    options = {"dropout_p": d(probabilities), "seed": 5, "eps": d(some([1e-5, 1e-2]))}
    return Call(op, tensors, options | {"prenorm": d(flags) and "residual" in tensors})


def ffn_calls(d: Draw) -> Call:
    N, E, F, gated = d(rows), d(features), d(features), d(flags)
    tensors = {"input": d.tensor(N, E), "weight1": d.tensor(F, E, scale=E**-0.5)}
    tensors |= {"bias1": d.vector(F) if d(flags) else None, "weight2": d.tensor(E, F, scale=F**-0.5)}
    tensors["bias2"] = d.vector(E) if d(flags) else None
    if gated:
        tensors["weight_gate"] = d.tensor(F, E, scale=E**-0.5)
        tensors["bias_gate"] = d.vector(F) if d(flags) else None
    activation = d(some(["gelu", "gelu_tanh", "silu"]))  # a kink would turn a rounding into an error
    return Call("ffn", tensors, {"activation": activation, "dropout_p": d(probabilities), "seed": 5})


def linear_calls(d: Draw) -> Call:
    N, E, F = d(rows), d(features), d(features)
    bias = d.vector(F) if d(flags) else None
    return Call("linear", {"input": d.tensor(N, E), "weight": d.tensor(F, E), "bias": bias}, {})


def linear_cross_entropy_calls(d: Draw) -> Call:
    N, E, V = d(rows), d(features), d(some([2, 33, 100, 700]))
    target = torch.where(d.below(2, N) < d(some([1, 2])), d.below(V, N), -100)
    target[0] = 0
    tensors = {"input": d.tensor(N, E), "linear_weight": d.tensor(V, E, scale=E**-0.5), "target": target}
    if d(flags):
        tensors["linear_bias"] = d.vector(V)
    options = {"reduction": d(some(["mean", "sum", "none"])), "label_smoothing": d(some([0.0, 0.1, 1.0]))}
    options |= {"z_loss": d(some([0.0, 0.01])), "softcap": d(some([None, 5.0]))}
    return Call("linear_cross_entropy", tensors, options)


def embedding_calls(d: Draw) -> Call:
    V, E, B, T = d(some([1, 7, 100])), d(features), d(some([1, 3])), d(some([1, 5, 40]))
    tokens = d.below(V, B, T)
    tensors = {"tokens": tokens, "weight": d.tensor(V, E)}
    if d(flags):
        tensors["positions"] = d.tensor(T, E)
    if d(flags):
        tensors |= {"segments": tokens % 2, "segment_weight": d.tensor(2, E)}
    return Call("embedding", tensors, {"scale": d(some([1.0, 3.0])), "dropout_p": d(probabilities), "seed": 2})


CALLS = {
    "attention": attention_calls,
    "layer_norm": norm_calls,
    "ffn": ffn_calls,
    "linear": linear_calls,
    "linear_cross_entropy": linear_cross_entropy_calls,
    "embedding": embedding_calls,
}


@pytest.mark.parametrize("op", CALLS)
@given(data=st.data())
def test_any_call(backend_isa, op, data):
    skip_unless_served(backend_isa, op)
    call = CALLS[op](Draw(data.draw))
    try:
        check(call.op, call.tensors, call.options, backend_isa, magnitudes=call.magnitudes, luck=LUCK)
    except backends.BackendError:
        assume(not backend_isa.startswith("cuda"))  # these leave some dtypes and sizes to Triton's
        raise
