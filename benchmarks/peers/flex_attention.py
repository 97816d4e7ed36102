"""torch's FlexAttention: the mask as a function, compiled; blocks that it empties are skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pytransformer.benchmarks.peers._peer import Peer, without_dropout


def attention(workload: Any) -> Callable[..., Any]:
    """The mask is built outside of the timing, as FlexAttention's users do."""
    without_dropout(workload)
    query, key, keep = (workload.tensors.get(name) for name in ("query", "key", "attn_mask"))
    (B, _, T, _), S = query.shape, key.shape[2]
    causal, grouped = workload.options.get("is_causal", False), query.shape[1] != key.shape[1]
    back, _ = workload.options.get("window") or (None, None)
    rows = keep is not None and keep.shape[2] > 1

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen = (q >= k) if causal or back is not None else (k >= 0)
        if back is not None:
            seen = seen & (q - k <= back)
        return seen if keep is None else seen & keep[b, 0, q if rows else 0, k]

    masked = causal or back is not None or keep is not None
    blocks = create_block_mask(visible, B, None, T, S, device=query.device) if masked else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value, attn_mask=None: compiled(query, key, value, block_mask=blocks, enable_gqa=grouped)


PEERS = (Peer("flex-attention", {"attention": attention}, automatic=False),)
