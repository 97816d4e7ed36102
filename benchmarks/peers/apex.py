"""NVIDIA Apex's fused layer_norm; the residual is added before."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from pytransformer.benchmarks.peers._peer import Peer


def layer_norm(workload: Any) -> Callable[..., Any]:
    function = importlib.import_module("apex.normalization").fused_layer_norm_affine
    width = workload.tensors["input"].shape[-1:]
    return lambda input, weight, bias, residual: function(input + residual, weight, bias, width)


PEERS = (Peer("apex", {"layer_norm": layer_norm}, "apex", "apex", gpu=True),)
