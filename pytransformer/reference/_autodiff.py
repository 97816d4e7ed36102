"""The vector-Jacobian product of a reference, by autograd: every reference's backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def vjp(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` against ``grad_outputs``, one for each input.

    Differentiable itself where gradients are enabled, which is how the fused ops serve a double
    backward. Each input gets an alias of its own, so that one tensor passed twice keeps two gradients.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    inside_kernel = excluded.has(torch._C.DispatchKey.AutogradFunctionality)
    create_graph = torch.is_grad_enabled() and not inside_kernel
    create_graph = create_graph and any(x is not None and x.requires_grad for x in (*inputs, *grad_outputs))
    with torch.enable_grad(), _recording():
        aliases = [
            None if x is None else (x.view_as(x) if create_graph and x.requires_grad else _leaf(x)) for x in inputs
        ]
        outputs = function(*aliases)
        pairs = [(y, dy) for y, dy in zip(outputs, grad_outputs, strict=True) if dy is not None and y.requires_grad]
        wanted = [x for x in aliases if x is not None and x.requires_grad]
        grads = torch.autograd.grad(
            [y for y, _ in pairs],
            wanted,
            [dy for _, dy in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    found = iter(grads)
    return [next(found) if x is not None and x.requires_grad else None for x in aliases]


def _recording() -> AbstractContextManager[object]:
    """Lets autograd see the operations of the block, which inside a library op's kernel it does not."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    guard: AbstractContextManager[object] = torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set(), excluded
    )
    return guard


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


def or_empty(grad: Tensor | None, like: Tensor) -> Tensor:
    """A library op returns tensors only: an absent gradient is an empty one."""
    return like.new_empty(0) if grad is None else grad
