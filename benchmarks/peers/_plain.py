"""A workload's plain PyTorch as a module, for engines that convert modules: weights inside, the rest as inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor


class Plain(torch.nn.Module):
    """``workload.peer`` of the tensors that change from call to call.

    Attributes:
        names: of these tensors.
        inputs: these tensors.
    """

    def __init__(self, workload: Any) -> None:
        super().__init__()
        self._peer = workload.peer
        self.names = [k for k, v in workload.tensors.items() if v is not None and k not in workload.weights]
        self.inputs = tuple(workload.tensors[name] for name in self.names)
        for name in workload.weights:
            self.register_buffer(name, workload.tensors[name])
        self._constant = tuple(workload.weights)
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        constant = {name: getattr(self, name) for name in self._constant}
        return self._peer(**constant, **dict(zip(self.names, inputs, strict=True)))

    def changing(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """The inputs among ``tensors``; floating ones in float32, which numpy knows."""
        return [x.float() if (x := tensors[name]).is_floating_point() else x for name in self.names]


def widened(workload: Any) -> Any:
    """The same workload with float32 tensors."""
    wide = {k: v.float() if v is not None and v.is_floating_point() else v for k, v in workload.tensors.items()}
    return replace(workload, tensors=wide)
