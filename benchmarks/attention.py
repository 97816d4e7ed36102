"""attention against ``F.scaled_dot_product_attention``, at the sizes of BERT-base."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.benchmarks._case import Case, OpProblem, Problem, draw, dtype_name

FORWARD_TARGETS = {("plain", 512): 1.8, ("causal", 512): 2.5}  # in bfloat16
VARIANTS = ("plain", "causal", "padding")


def cases() -> Iterator[Case]:
    """Forward at S = 128 and 512 with each kind of mask, backward at 512."""
    for dtype in (torch.bfloat16, torch.float32):
        for S, variants in ((512, VARIANTS), (128, ("plain", "padding"))):
            for variant in variants:
                yield case("fwd", dtype, 8, 12, S, 64, variant)
        for variant in ("plain", "causal"):
            yield case("bwd", dtype, 8, 12, 512, 64, variant)


def case(direction: str, dtype: torch.dtype, B: int, H: int, S: int, D: int, variant: str) -> Case:
    """Self-attention of S queries and keys."""
    product = 2 * D * visible_pairs(B, S, variant) * H
    tensor = B * H * S * D * dtype.itemsize
    forward = direction == "fwd"
    target = FORWARD_TARGETS.get((variant, S)) if forward and dtype == torch.bfloat16 else None
    return Case(
        op="attention",
        direction=direction,
        dtype=dtype_name(dtype),
        shape=f"{B}x{H}x{S}x{D}" + ("" if variant == "plain" else f" {variant}"),
        operations=product * (2 if forward else 5),  # q k^T and p v; and in the backward dp, dv, dq, dk, p again
        bytes=tensor * (4 if forward else 8),  # q k v out; and in the backward dout dq dk dv
        build=partial(build, direction, dtype, B, H, S, D, variant),
        target=target,
        short=S == 512 and (forward or variant == "plain"),
    )


def lengths(B: int, S: int) -> Tensor:
    """Padded batches: lengths spread evenly from half of S to S."""
    return torch.linspace(S / 2, S, B).long()


def visible_pairs(B: int, S: int, variant: str) -> float:
    """How many (query, key) pairs of the whole batch a mask leaves, for one head."""
    if variant == "padding":
        return float(lengths(B, S).sum()) * S
    return B * S * (S + 1) / 2 if variant == "causal" else float(B * S * S)


def build(direction: str, dtype: torch.dtype, B: int, H: int, S: int, D: int, variant: str) -> Problem:
    """The tensors and both providers. Padding is a bool mask [B,1,1,S] to both."""
    tensors: dict[str, Tensor | None] = {
        name: draw(B, H, S, D, dtype=dtype, seed=seed) for seed, name in enumerate(("query", "key", "value"))
    }
    options = {"is_causal": variant == "causal"}
    if variant == "padding":
        tensors["attn_mask"] = (torch.arange(S) < lengths(B, S)[:, None])[:, None, None, :]

    def peer(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)

    problem = OpProblem("attention", tensors, options, peer, sampled=tuple(tensors))
    return problem.forward() if direction == "fwd" else problem.backward()
