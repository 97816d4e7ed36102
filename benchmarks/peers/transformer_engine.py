"""NVIDIA TransformerEngine's attention, with cuDNN or flash-attn below, and its layer_norm."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from pytransformer.benchmarks._case import AbsentError
from pytransformer.benchmarks.peers._peer import Peer, without_masks


def attention(workload: Any) -> Callable[..., Any]:
    without_masks(workload)
    if workload.dtype not in (torch.bfloat16, torch.float16):
        raise AbsentError("it takes 16-bit types only")
    engine = importlib.import_module("transformer_engine.pytorch")
    H, G, D = workload.tensors["query"].shape[1], workload.tensors["key"].shape[1], workload.tensors["query"].shape[3]
    kind = "causal" if workload.options.get("is_causal", False) else "no_mask"
    module = engine.DotProductAttention(H, D, num_gqa_groups=G, attn_mask_type=kind, qkv_format="bshd",
                                        attention_dropout=0.0)  # fmt: skip

    def run(query: Any, key: Any, value: Any) -> Any:
        views = (x.transpose(1, 2).contiguous() for x in (query, key, value))
        return module(*views).unflatten(-1, (H, D)).transpose(1, 2)

    return run


PEERS = (
    Peer("transformer-engine", {"attention": attention}, "transformer_engine", "transformer-engine", gpu=True),
)  # fmt: skip
