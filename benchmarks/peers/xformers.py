"""xFormers' memory-efficient attention; takes [B,T,H,D]."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from pytransformer.benchmarks._case import AbsentError
from pytransformer.benchmarks.peers._peer import Peer, without_masks


def attention(workload: Any) -> Callable[..., Any]:
    without_masks(workload)
    if workload.tensors["query"].shape[1] != workload.tensors["key"].shape[1]:
        raise AbsentError("its grouped heads take another layout")
    xops = importlib.import_module("xformers.ops")
    bias = xops.LowerTriangularMask() if workload.options.get("is_causal", False) else None

    def run(query: Any, key: Any, value: Any) -> Any:
        views = (x.transpose(1, 2) for x in (query, key, value))
        return xops.memory_efficient_attention(*views, attn_bias=bias).transpose(1, 2)

    return run


PEERS = (Peer("xformers", {"attention": attention}, "xformers", "xformers", gpu=True),)
