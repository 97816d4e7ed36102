"""What a peer is: a name, what must be installed, and for each op a few lines that call it.

An adapter is given the workload of a case (``OpProblem`` or a model's) and returns a function of the workload's
tensors by name, as plain PyTorch would be written. Where it cannot serve the workload it raises ``AbsentError``
with the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.benchmarks._case import AbsentError

Adapter = Callable[[Any], Callable[..., Any]]


@dataclass(frozen=True)
class Peer:
    """One peer.

    Attributes:
        name: in tables and after ``--peers``.
        adapters: by op; ``models`` for a whole model; ``*`` for anything that is plain PyTorch.
        module: what must be importable.
        distribution: the package that has it, whose version is recorded.
        gpu: it runs on NVIDIA GPUs only.
        isolated: it brings a runtime of its own and gets a process of its own.
        inference: it has no backward.
        automatic: it takes part where it is installed; the others when they are asked for by name.
    """

    name: str
    adapters: Mapping[str, Adapter]
    module: str = "torch"
    distribution: str = "torch"
    gpu: bool = False
    isolated: bool = False
    inference: bool = False
    automatic: bool = True

    def why_not(self) -> str | None:
        """Why it cannot run on this machine at all, or None."""
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            return f"{self.distribution} is not installed (pip install {self.distribution})"
        if self.gpu and not torch.cuda.is_available():
            return "it needs an NVIDIA GPU, and torch sees none"
        return None

    def version(self) -> str:
        """Of the package that it comes in."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return "unknown"

    def check(self, workload: Any) -> None:
        """Raises ``AbsentError`` where it needs no adapter to say that it cannot serve the workload."""
        if not self.adapters.keys() & {workload.op, "*"}:
            raise AbsentError(f"it has no {workload.op}")
        if self.inference and workload.direction != "fwd":
            raise AbsentError("it has no backward")

    def function(self, workload: Any) -> Callable[..., Any]:
        """The workload by this peer.

        Raises:
            AbsentError: it cannot serve it.
        """
        self.check(workload)
        return (self.adapters.get(workload.op) or self.adapters["*"])(workload)


def dropped(workload: Any, x: Tensor) -> Tensor:
    """``x`` after the workload's dropout, for peers that have none of their own: as their users write it."""
    p: float = workload.options.get("dropout_p", 0.0)
    return F.dropout(x, p) if p > 0 else x


def without_dropout(workload: Any) -> None:
    """Refuses dropout of the attention's weights, which is not passed on to this peer."""
    if workload.options.get("dropout_p", 0.0) > 0:
        raise AbsentError("it is compared without dropout only")


def without_masks(workload: Any) -> None:
    """Refuses what the fused attention of GPU libraries has no argument for."""
    without_dropout(workload)
    if workload.tensors.get("attn_mask") is not None:
        raise AbsentError("it takes no mask of single keys")
