"""The backends of ``F.scaled_dot_product_attention``, each by itself: torch's own choice is the row's ``torch``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from pytransformer.benchmarks.peers._peer import Peer


def attention(backend: SDPBackend, workload: Any) -> Callable[..., Any]:
    def run(**tensors: Any) -> Any:
        with sdpa_kernel(backend):
            return workload.peer(**tensors)

    return run


def _peer(name: str, backend: SDPBackend, gpu: bool = False) -> Peer:
    return Peer(f"sdpa-{name}", {"attention": partial(attention, backend)}, gpu=gpu, automatic=gpu)


PEERS = (
    _peer("math", SDPBackend.MATH),
    _peer("flash", SDPBackend.FLASH_ATTENTION),
    _peer("efficient", SDPBackend.EFFICIENT_ATTENTION, gpu=True),
    _peer("cudnn", SDPBackend.CUDNN_ATTENTION, gpu=True),
)
