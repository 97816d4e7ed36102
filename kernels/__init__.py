"""Triton kernels, one file per op. Installed as ``pytransformer.kernels``.

Triton is imported when a kernel is first asked for, never with the package: a machine without a GPU needs
no Triton.
"""

from __future__ import annotations

import importlib.util

import torch


def unavailable() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None
