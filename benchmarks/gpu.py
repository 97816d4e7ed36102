"""Every op and model on the GPU: the same declarations, timed by events and graph replay (``_device``)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pytransformer.benchmarks import attention, embedding, ffn, layer_norm, linear_cross_entropy, models
from pytransformer.benchmarks._case import Case


def why_not() -> str | None:
    """Why this suite cannot run here, or None."""
    if torch.cuda.is_available():
        return None
    reason = "torch sees no GPU" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
    return f"the suite gpu needs an NVIDIA GPU, and {reason}"


def cases() -> Iterator[Case]:
    """The cases of the CPU's suites, on the device."""
    for module in (attention, layer_norm, ffn, linear_cross_entropy, embedding, models):
        yield from module.cases("cuda")
