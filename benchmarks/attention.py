"""attention against ``F.scaled_dot_product_attention``, at the sizes of the named models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.benchmarks._case import Case, Problem, draw, dtype_name
from pytransformer.benchmarks._models import (
    BERT_BASE,
    BERT_LARGE,
    GPT2,
    LLAMA_3_8B,
    TRANSFORMER_BASE,
    TRANSFORMER_BIG,
    VIT_BASE,
    WHISPER_SMALL,
    Model,
)
from pytransformer.benchmarks._op_problem import OpProblem

REAL = 0.56  # of a padded batch: lengths spread evenly around it, up to the whole
DROPOUT, SEED = 0.1, 1
CHECKED_GROUPS = 2  # key/value heads, of the first sequence
WINDOW = 1024
FORWARD = (
    (BERT_BASE, 8, 128, ""),
    (BERT_BASE, 8, 128, "padding"),
    (BERT_BASE, 8, 512, ""),
    (BERT_BASE, 8, 512, "causal"),
    (BERT_BASE, 8, 512, "padding"),
    (BERT_LARGE, 4, 384, ""),
    (TRANSFORMER_BASE, 16, 64, ""),
    (TRANSFORMER_BIG, 8, 64, "padding"),
    (GPT2, 1, 1024, ""),
    (VIT_BASE, 8, 197, ""),
    (WHISPER_SMALL, 1, 1500, ""),
    (LLAMA_3_8B, 1, 512, ""),
)
IN_16_BITS = (BERT_LARGE, TRANSFORMER_BIG, WHISPER_SMALL)  # whose rows in float32 would tell nothing new
BACKWARD = ((BERT_BASE, 8, 128, ""), (BERT_BASE, 2, 512, ""), (BERT_BASE, 2, 512, "padding"), (GPT2, 1, 1024, ""))
TRAINING = ((BERT_BASE, 2, 512, ""), (BERT_BASE, 2, 512, "padding"))
TARGETS = {"": 1.8, "causal": 2.5}  # of the forward in bfloat16, for BERT-base at 512
DEFAULT = {("fwd", BERT_BASE, 512), ("bwd", BERT_BASE, 512)}


def cases(device: str = "cpu") -> Iterator[Case]:
    """Every model's attention forward; backward, and both together, where it is trained most."""
    for dtype in (torch.bfloat16, torch.float32):
        for direction, rows in (("fwd", FORWARD), ("bwd", BACKWARD), ("fwd+bwd", TRAINING)):
            for model, B, S, variant in rows:
                if dtype == torch.bfloat16 or model not in IN_16_BITS:
                    yield case(direction, dtype, model, B, S, variant, device=device)


def case(
    direction: str,
    dtype: torch.dtype,
    model: Model,
    B: int,
    S: int,
    variant: str = "",
    device: str = "cpu",
    **more: Any,
) -> Case:
    """Self-attention of S queries and keys; ``decode`` is one query over S cached keys."""
    T = 1 if variant == "decode" else S
    product = 2 * model.head_dim * model.heads * visible_pairs(model, B, T, S, variant)
    queries, keys = (B * n * model.head_dim * dtype.itemsize for n in (model.heads * T, model.groups * S))
    once = 2 * queries + 2 * keys  # q, out; k, v
    promised = direction == "fwd" and dtype == torch.bfloat16 and (model, S) == (BERT_BASE, 512) and variant in TARGETS
    settings = {"targets": {"torch": TARGETS[variant]} if promised else {}, **more}
    return Case(
        op="attention",
        direction=direction,
        dtype=dtype_name(dtype),
        shape=f"{model.name} {B}x{S} {variant}".rstrip(),
        # q k^T and p v; in the backward dp, dv, dq, dk and p again
        operations=product * {"fwd": 2, "bwd": 5, "fwd+bwd": 7}[direction],
        # what the forward read and wrote, and the gradient of each
        bytes=once * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[direction],
        build=partial(build, direction, dtype, model, B, S, variant, device),
        sizes={"B": B, "H": model.heads, "G": model.groups, "T": T, "S": S, "D": model.head_dim},
        device=device,
        short=(direction, model, S) in DEFAULT and (direction == "fwd" or variant == ""),
        **settings,
    )


def lengths(B: int, S: int) -> Tensor:
    """Of a padded batch: spread evenly, the longest S, ``REAL`` of all."""
    return torch.linspace(max(1.0, (2 * REAL - 1) * S), S, B).round().long()


def sparse(S: int, device: str) -> Tensor:
    """bool [S,S]: of the blocks of 128 every other one, and of these nine tenths."""
    generator = torch.Generator().manual_seed(SEED)
    blocks = (torch.rand(-(-S // 128), -(-S // 128), generator=generator) < 0.5).to(device)
    keep = blocks.repeat_interleave(128, 0).repeat_interleave(128, 1)[:S, :S]
    at = torch.arange(S, device=device)
    return keep & ((at[:, None] * 7 + at * 13) % 10 > 0) | (at[:, None] == at)


def banded(S: int, device: str) -> Tensor:
    """bool [S,S]: causal, ``WINDOW`` keys back."""
    back = torch.arange(S, device=device)[:, None] - torch.arange(S, device=device)
    return (back >= 0) & (back <= WINDOW)


def documents(S: int, device: str) -> Tensor:
    """bool [S,S]: causal within each of eight documents of unequal lengths."""
    at = torch.arange(S, device=device)
    document = ((at.double() / S) ** 0.8 * 8).long()
    return (document[:, None] == document) & (at[:, None] >= at)


MASKS = {"bool mask": sparse, "window": banded, "documents": documents}


def visible_pairs(model: Model, B: int, T: int, S: int, variant: str) -> float:
    """How many (query, key) pairs of the whole batch the masks leave, for one head."""
    if variant == "padding":
        return float(lengths(B, S).sum()) * T
    if variant in MASKS:
        return B * float(MASKS[variant](S, "cpu").sum())
    causal = (model.causal or variant == "causal") and variant != "decode"
    return B * S * (S + 1) / 2 if causal else float(B * T * S)


def build(direction: str, dtype: torch.dtype, model: Model, B: int, S: int, variant: str, device: str) -> Problem:
    """The tensors and both providers. Padding is a bool mask [B,1,1,S] to both."""
    decode = variant == "decode"
    rows = {"query": (model.heads, 1 if decode else S), "key": (model.groups, S), "value": (model.groups, S)}
    tensors: dict[str, Tensor | None] = {
        name: draw(B, heads, length, model.head_dim, dtype=dtype, seed=seed, device=device)
        for seed, (name, (heads, length)) in enumerate(rows.items())
    }
    options: dict[str, Any] = {"is_causal": (model.causal or variant == "causal") and not decode}
    if model.groups != model.heads:
        options["enable_gqa"] = True
    if variant == "padding":
        keep = torch.arange(S) < lengths(B, S)[:, None]
        tensors["attn_mask"] = keep[:, None, None, :].to(device)
    dropout = {"dropout_p": DROPOUT} if variant == "dropout" else {}
    ours = {**options, **dropout, "seed": torch.tensor([SEED, 0], device=device)} if dropout else options
    keep = None
    if variant in MASKS:
        keep = MASKS[variant](S, device)[None, None]
        if variant == "window":
            ours = {**options, "window": (WINDOW, 0)}
        else:
            tensors["attn_mask"] = keep.expand(B, 1, S, S)

    def peer(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        mask = keep if attn_mask is None else attn_mask
        return F.scaled_dot_product_attention(query, key, value, mask, **options, **dropout)

    shared = model.heads // model.groups
    heads, groups = (1, CHECKED_GROUPS * shared), (1, CHECKED_GROUPS)
    sampled = {"query": heads, "output": heads, "key": groups, "value": groups, "attn_mask": (1,)}
    if dropout:
        sampled = {}  # dropped elements hang on the whole shape
    return OpProblem("attention", direction, tensors, ours, peer, sampled=sampled, random=bool(dropout)).problem()
