"""What this project promises of its CPU kernels: against torch, and as a fraction of the machine's peak.

The rows of the table come first, each with its targets; then the whole grid of the ops, in which no shape may lose
to torch. Models are against the peers that are installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pytransformer import ops
from pytransformer.benchmarks import attention, embedding, ffn, layer_norm, linear, linear_cross_entropy, memory, models
from pytransformer.benchmarks._case import OURS, Case, Problem
from pytransformer.benchmarks._models import BERT_BASE, Model

HEADS_OF_128 = Model("6 heads of 128", 6, 128, 3072, 30522)
LOSES = 0.97  # of torch's speed: below, a shape of the grid loses
UNPADDED = "unpadded"
BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16


def cases() -> Iterator[Case]:
    """The table, then the grid."""
    table = [*_attention_forward(), *_attention_backward(), *_attention_special(), *_rows(), *_models()]
    yield from table
    named = {case.name for case in table}
    for module in (attention, layer_norm, ffn, linear, linear_cross_entropy, embedding):
        for case in module.cases():
            if case.name not in named:
                yield replace(case, targets={"torch": LOSES}, alone=True)


def _attention_forward() -> Iterator[Case]:
    forward = partial(_attention, "fwd")
    for B, S in ((8, 512), (1, 2048)):
        yield forward(BF16, BERT_BASE, B, S, ratio=2.3, limit=0.78)
        yield forward(BF16, HEADS_OF_128, B, S, ratio=2.2, limit=0.85)
        yield forward(BF16, BERT_BASE, B, S, "causal", ratio=3.8 if S == 512 else 2.6)
        yield forward(FP32, BERT_BASE, B, S, ratio=1.25, limit=0.84)
        yield forward(FP32, BERT_BASE, B, S, "causal", ratio=2.0 if S == 512 else 1.4)
    yield forward(BF16, BERT_BASE, 8, 128, ratio=2.2)
    yield forward(FP32, BERT_BASE, 8, 128, ratio=1.3)
    yield forward(BF16, BERT_BASE, 8, 128, "causal", ratio=2.8)


def _attention_backward() -> Iterator[Case]:
    backward = partial(_attention, "bwd")
    yield backward(BF16, BERT_BASE, 1, 1024, ratio=1.75, limit=0.78)
    yield backward(BF16, BERT_BASE, 4, 512, "causal", ratio=2.8)
    yield backward(FP32, BERT_BASE, 1, 1024, ratio=1.2, limit=0.82)
    yield backward(FP32, BERT_BASE, 8, 128, ratio=1.0)
    yield backward(FP32, BERT_BASE, 4, 512, "causal", ratio=1.7)


def _attention_special() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        padded = attention.case("fwd", dtype, BERT_BASE, 8, 512, "padding", targets={UNPADDED: 1.6})
        yield replace(padded, build=partial(beside_unpadded, padded))
    yield _attention("fwd", FP16, BERT_BASE, 4, 512, ratio=2.4)
    yield _attention("bwd", FP16, BERT_BASE, 1, 512, ratio=10.0)
    yield linear.case("fwd", FP16, BERT_BASE, 1024, targets={"torch": 4.5})
    yield _attention("fwd+bwd", BF16, BERT_BASE, 4, 512, "dropout", ratio=2.5)
    decode = attention.case("fwd", BF16, BERT_BASE, 8, 4096, "decode", targets={"torch": 8.0}, rate_target=30e9)
    yield decode


def _rows() -> Iterator[Case]:
    for dtype, ratio in ((BF16, 2.5), (FP32, 1.3)):
        for direction in ("fwd", "bwd"):
            N = 32768  # beyond the caches
            yield layer_norm.case(direction, dtype, BERT_BASE, N, targets={"torch": ratio}, limit_target=0.8)
    for dtype, direction, ratio, limit in (
        (FP32, "fwd", 1.15, 0.92),
        (BF16, "fwd", 1.1, 0.92),
        (FP32, "bwd", 1.08, None),
        (BF16, "bwd", 1.0, None),
    ):
        yield ffn.case(direction, dtype, BERT_BASE, 1024, targets={"torch": ratio}, limit_target=limit)
    yield linear_cross_entropy.case("fwd+bwd", BF16, memory.VOCABULARY_32K, 512, targets={"torch": 1.3})
    yield memory.cross_entropy(BF16)


def _models() -> Iterator[Case]:
    for dtype in (FP32, BF16):
        for B, S in ((8, 128), (1, 512)):
            yield models.bert_case(dtype, B, S, targets={"zentorch": 1.0, "openvino": 1.0})
    for S in (128, 512):
        yield models.bert_case(FP32, 8, S, padded=True, targets={"torch": 1.9, "ctranslate2": 1.0})


def _attention(
    direction: str,
    dtype: torch.dtype,
    model: Model,
    B: int,
    S: int,
    variant: str = "",
    *,
    ratio: float,
    limit: float | None = None,
) -> Case:
    return attention.case(direction, dtype, model, B, S, variant, targets={"torch": ratio}, limit_target=limit)


def beside_unpadded(case: Case) -> Problem:
    """The padded call beside the same call without its mask, which is what skipping is measured by."""
    problem = case.build()
    whole: dict[str, Any] = {k: v for k, v in problem.workload.tensors.items() if k != "attn_mask"}

    def unpadded() -> Tensor:
        with torch.no_grad():
            found: Tensor = ops.attention(**whole)
            return found

    providers = {OURS: problem.providers[OURS], UNPADDED: unpadded}
    return replace(problem, providers=providers, random=frozenset([UNPADDED]))
