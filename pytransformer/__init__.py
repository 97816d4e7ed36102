"""Fused kernels for the Transformer, and drop-in PyTorch modules over them.

from pytransformer import nn, ops            # ops.attention, ops.layer_norm, ops.ffn, ...
print(pytransformer.explain(model, batch))   # which kernel ran, and why not the others
"""

import warnings

from pytransformer import backends, masks, nn, ops
from pytransformer.backends import BackendError, unavailable, use_backend
from pytransformer.explain import explain

__version__ = "0.1.0"
__all__ = ["BackendError", "backends", "explain", "masks", "nn", "ops", "use_backend"]

if (_reason := unavailable("cpu")) is not None:
    warnings.warn(
        f"pytransformer: the CPU kernels cannot be used: {_reason}; calls run on the PyTorch reference",
        RuntimeWarning,
        stacklevel=2,
    )
