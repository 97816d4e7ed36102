"""The linear layers outside of ffn: by the CPU kernels where these are faster, else torch's own.

``ops.linear`` knows where its kernel is the faster one. Elsewhere the product goes to torch at once: on a GPU it is
torch's in any case, a graph that is being traced must not hang on how many rows there are and leaves it to the
compiler, and subclasses of tensors have products of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer import ops
from pytransformer.nn._plain import LINEAR, is_plain


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``."""
    ours = x.is_cpu and type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and x.dtype == weight.dtype
    if ours and not torch.compiler.is_compiling():
        return ops.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def apply_linear(module: Any, x: Tensor) -> Tensor:
    """``module(x)``, of an ``nn.Linear`` or what stands in its place."""
    if is_plain(module, LINEAR):
        return linear(x, module.weight, module.bias)
    return module(x)  # type: ignore[no-any-return]
