"""``torch.compile`` of the plain PyTorch that the row's ``torch`` runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pytransformer.benchmarks.peers._peer import Peer


def compiled(workload: Any) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(workload.peer, dynamic=False)


PEERS = (Peer("torch.compile", {"*": compiled}, automatic=False),)
