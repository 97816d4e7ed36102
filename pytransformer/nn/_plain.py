"""Whether a submodule can be computed as a part of a fused op.

A fused op reads a submodule's parameters and never calls the submodule. That is the same thing only where nobody
could tell: the submodule is exactly of the class it was made as (not quantised, parametrised, wrapped by an
adapter), its forward is untouched, and no hook waits for the call.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as _torch_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

LINEAR: tuple[type[nn.Module], ...] = (nn.Linear, NonDynamicallyQuantizableLinear)
DROPOUT: tuple[type[nn.Module], ...] = (nn.Dropout,)


def is_plain(module: Any, types: tuple[type[nn.Module], ...]) -> bool:
    """Is ``module`` exactly one of ``types``, with nothing that a skipped call would leave out?"""
    return (
        type(module) in types
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not _torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def active_dropout(dropout: Any) -> float:
    """The probability with which an ``nn.Dropout`` drops elements now."""
    return float(dropout.p) if dropout.training else 0.0
