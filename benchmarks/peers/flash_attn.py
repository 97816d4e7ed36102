"""flash-attn: 2 for Ampere on, 3 for Hopper, 4 for Hopper and Blackwell. All take [B,T,H,D]."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pytransformer.benchmarks._case import AbsentError
from pytransformer.benchmarks.peers._peer import Peer, without_masks


def attention(module: str, workload: Any) -> Callable[..., Any]:
    without_masks(workload)
    if workload.dtype not in (torch.bfloat16, torch.float16):
        raise AbsentError("it takes 16-bit types only")
    function = importlib.import_module(module).flash_attn_func
    causal = workload.options.get("is_causal", False)

    def run(query: Any, key: Any, value: Any) -> Any:
        out = function(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal=causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def _peer(name: str, module: str, distribution: str) -> Peer:
    return Peer(name, {"attention": partial(attention, module)}, module, distribution, gpu=True)


PEERS = (
    _peer("flash-attn-2", "flash_attn", "flash-attn"),
    _peer("flash-attn-3", "flash_attn_interface", "flash-attn-3"),
    _peer("flash-attn-4", "flash_attn.cute", "flash-attn-4"),
)
