"""Liger's Triton kernels: layer_norm and RMSNorm (dropout and the residual before), the fused linear cross entropy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from pytransformer.benchmarks.peers._peer import Peer, dropped


def layer_norm(workload: Any) -> Callable[..., Any]:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_layer_norm
    return lambda input, weight, bias, residual: function(dropped(workload, input) + residual, weight, bias, 1e-5)


def rms_norm(workload: Any) -> Callable[..., Any]:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_rms_norm
    return lambda input, weight, residual: function(dropped(workload, input) + residual, weight, 1e-6)


def linear_cross_entropy(workload: Any) -> Callable[..., Any]:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda input, linear_weight, target: function(input, linear_weight, target)


ADAPTERS = {"layer_norm": layer_norm, "rms_norm": rms_norm, "linear_cross_entropy": linear_cross_entropy}
PEERS = (Peer("liger", ADAPTERS, "liger_kernel", "liger-kernel", gpu=True),)
