"""Triton kernels: every GPU that Triton reaches, and CPU tensors in its interpreter where that is switched on."""

from __future__ import annotations

import importlib.util
import os

import torch


def unavailable() -> str | None:
    """Why the Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "torch sees no GPU"
    return None
