"""What the project promises of its kernels on a GPU (an H200, bfloat16), and every op and model beside it.

The rows of the table come first, each with its target, and each for one backend, which the row names: Triton's kernels
and the CUDA ones have promises of their own. Then a row of each op at the sizes of named models, and the models, by
the library's own choice of a backend. All are timed by events and graph replay (``_device``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from pytransformer.benchmarks import attention, embedding, ffn, layer_norm, linear_cross_entropy, models
from pytransformer.benchmarks._case import BYTES, Case
from pytransformer.benchmarks._models import BERT_BASE, GPT2, LLAMA_3_8B, TRANSFORMER_BASE, Model

BF16 = torch.bfloat16
DEVICE = "cuda"
# 16 heads of 128 at 4,096 tokens, and fewer the longer the sequence is: the check is in float64.
WIDE_HEADS = {4096: Model("H16 D128", 16, 128, 8192, 50304), 8192: Model("H8 D128", 8, 128, 4096, 50304),
              16384: Model("H4 D128", 4, 128, 2048, 50304)}  # fmt: skip
PADDED = Model("H24 D64", 24, 64, 6144, 30522)
HEADS = Model("H8 D64", 8, 64, 2048, 50304)
WIDTHS = (512, 1024, 2048, 4096, 8192)
MASKING_BACKENDS = ("torch", "sdpa-efficient", "sdpa-cudnn")  # of torch's attention, those that take a mask of keys


def why_not() -> str | None:
    """Why this suite cannot run here, or None."""
    if torch.cuda.is_available():
        return None
    reason = "torch sees no GPU" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
    return f"the suite gpu needs an NVIDIA GPU, and {reason}"


def cases() -> Iterator[Case]:
    """The promised rows, then the ops in bfloat16 and the models."""
    yield from promised_of_triton()
    yield from promised_of_cuda()
    for module in (attention, layer_norm, ffn, linear_cross_entropy, embedding):
        found = (case for case in module.cases(DEVICE) if case.dtype == "bfloat16" and case.direction != "bwd")
        yield from (replace(case, targets={}) for case in found)
    yield from (replace(case, targets={}) for case in models.cases(DEVICE))


def promised_of_triton() -> Iterator[Case]:
    """Speed where nothing hides a tile, masks against what skips them or cannot, and the other ops."""
    by = partial(_by, "triton")
    for S, model in WIDE_HEADS.items():
        for variant, speed in (("", 450e12), ("causal", 420e12)):
            yield by(_attention("fwd", model, 1, S, variant, targets={}, speed_target=speed))
    yield by(_attention("fwd", PADDED, 14, 768, "padding", targets=dict.fromkeys(MASKING_BACKENDS, 3.0)))
    for variant in attention.MASKS:
        yield by(_attention("fwd+bwd", HEADS, 1, 8192, variant, targets={"flex-attention": 1.0}))
    yield by(_attention("bwd", WIDE_HEADS[8192], 1, 8192, "", targets={}, speed_target=380e12))
    yield from map(by, _layer_norms({"fwd": 0.92, "bwd": 0.88}))
    for model in (TRANSFORMER_BASE, BERT_BASE, Model("E=1024", 16, 64, 4096, 50304)):
        yield by(ffn.case("fwd+bwd", BF16, model, 8192, device=DEVICE, targets={"torch.compile": 1.1}))
    loss = by(linear_cross_entropy.case("fwd+bwd", BF16, GPT2, 4096, device=DEVICE, targets={"torch": 1.0}))
    yield loss
    yield replace(loss, metric=BYTES, targets={"torch": 10.0})


def promised_of_cuda() -> Iterator[Case]:
    """The kernels of Ampere's instructions: products, norms, and a decoding that reads a long cache."""
    by = partial(_by, "cuda")
    for S in (4096, 16384):
        yield by(_attention("fwd", WIDE_HEADS[S], 1, S, "", targets={}, speed_target=330e12))
    yield by(_attention("bwd", WIDE_HEADS[8192], 1, 8192, "", targets={}, speed_target=290e12))
    yield by(_attention("fwd", LLAMA_3_8B, 32, 8192, "decode", targets={}, limit_target=0.85))
    yield from map(by, _layer_norms({"fwd": 0.95, "bwd": 0.9}))


def _by(backend: str, case: Case) -> Case:
    return replace(case, shape=f"{case.shape} {backend}", backend=backend)


def _attention(direction: str, model: Model, B: int, S: int, variant: str, **more: object) -> Case:
    return attention.case(direction, BF16, model, B, S, variant, device=DEVICE, **more)


def _layer_norms(limits: dict[str, float]) -> Iterator[Case]:
    """Rows of every width, 64 MiB of them; ``limits`` are the fractions of the machine's that are asked for."""
    for E in WIDTHS:
        model = Model(f"E={E}", E // 64, 64, 4 * E, 50304)
        for direction, limit in limits.items():
            yield layer_norm.case(
                direction, BF16, model, 2**25 // E, device=DEVICE, dropout_p=0.1, targets={}, limit_target=limit
            )
