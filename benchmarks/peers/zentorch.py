"""AMD's zentorch: a backend of ``torch.compile`` for inference on CPUs. It replaces torch's own kernels when it is
imported, so it has a process of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from pytransformer.benchmarks.peers._peer import Peer


def compiled(workload: Any) -> Callable[..., Any]:
    importlib.import_module("zentorch")
    torch.compiler.reset()
    return torch.compile(workload.peer, backend="zentorch", dynamic=False)


PEERS = (
    Peer("zentorch", {"*": compiled}, "zentorch", "zentorch", isolated=True, inference=True),
)  # fmt: skip
