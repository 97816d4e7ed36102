"""Peak memory of training, op by op and for a layer: what is saved for the backward, and what is written on the way.

Each row is measured in a process of its own (``_memory``). The ratio is the other's bytes over ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from pytransformer.benchmarks import _training, attention, embedding, ffn, layer_norm, linear_cross_entropy
from pytransformer.benchmarks._case import BYTES, Case
from pytransformer.benchmarks._models import BERT_BASE, GPT2, Model

VOCABULARY_32K = Model("32k tokens", 12, 64, 3072, 32768)


def cases() -> Iterator[Case]:
    """Forward and backward of each op at a long length; a layer of BERT-base at 2048."""
    both = "fwd+bwd"
    for dtype in (torch.float32, torch.bfloat16):
        yield _bytes(attention.case(both, dtype, BERT_BASE, 1, 2048))
        yield _bytes(attention.case(both, dtype, GPT2, 1, 2048))
        yield _bytes(layer_norm.case(both, dtype, BERT_BASE, 16384))
        yield _bytes(ffn.case(both, dtype, BERT_BASE, 2048))
        yield _bytes(linear_cross_entropy.case(both, dtype, VOCABULARY_32K, 2048))
    yield cross_entropy(torch.bfloat16)
    yield _bytes(embedding.case(both, torch.float32, BERT_BASE, 8, 512))
    for dtype in (torch.float32, torch.bfloat16):
        yield encoder_layer(dtype)


def encoder_layer(dtype: torch.dtype, device: str = "cpu") -> Case:
    """A step of training of a layer of BERT-base at 2048: 0.6 of what torch takes with attention written out."""
    targets = {_training.MATH: 1 / 0.6}
    return _training.case(dtype, BERT_BASE, 1, 1, 2048, device=device, metric=BYTES, targets=targets)


def cross_entropy(dtype: torch.dtype, tokens: int = 8192) -> Case:
    """The loss over a vocabulary of 32768: a tenth of torch's memory is asked for.

    Of as many tokens as a step of training has: the gradient of the weight is there whatever they are, and of 2,048 it
    alone is an eighth of what torch takes.
    """
    case = linear_cross_entropy.case("fwd+bwd", dtype, VOCABULARY_32K, tokens)
    return _bytes(replace(case, targets={"torch": 10.0}))


def _bytes(case: Case) -> Case:
    return replace(case, metric=BYTES)
