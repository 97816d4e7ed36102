"""NVIDIA Apex's fused layer_norm; dropout and the residual come before it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from pytransformer.benchmarks.peers._peer import Peer, dropped


def layer_norm(workload: Any) -> Callable[..., Any]:
    function = importlib.import_module("apex.normalization").fused_layer_norm_affine
    width = workload.tensors["input"].shape[-1:]
    return lambda input, weight, bias, residual: function(dropped(workload, input) + residual, weight, bias, width)


PEERS = (Peer("apex", {"layer_norm": layer_norm}, "apex", "apex", gpu=True),)
