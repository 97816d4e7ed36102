"""One call of an op computed three ways: by a backend, by the float64 oracle and by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pytransformer import _plain, ops
from pytransformer._tolerance import Comparison, compare

GRAD_SEED = 20170612  # of the gradients that backward passes start from


def parity(
    op: str,
    tensors: Mapping[str, Tensor | None],
    options: Mapping[str, Any] | None = None,
    *,
    backend: str = "auto",
    backward: bool = True,
    magnitudes: Mapping[str, float] | None = None,
) -> list[Comparison]:
    """Judges ``ops.<op>`` on ``backend``: each output, and with ``backward`` the gradient of each floating input.

    Args:
        op: name of a function of ``pytransformer.ops``.
        tensors: its tensor arguments by name; the floating ones are differentiated.
        options: its other arguments; a ``seed`` where there is dropout.
        backend: the one to judge.
        backward: also the gradients, named ``d<argument>``.
        magnitudes: by result, the ``magnitude`` of ``_tolerance.compare``.
    """
    options = dict(options or {})
    wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in tensors.items()}
    names = [k for k, v in tensors.items() if v is not None and v.is_floating_point()] if backward else []
    fused, plain = getattr(ops, op), getattr(_plain, op)
    expected = results(lambda **kw: fused(**kw, **options, backend="reference"), wide, names)
    actual = results(lambda **kw: fused(**kw, **options, backend=backend), tensors, names)
    measure = results(lambda **kw: plain(**kw, **options), tensors, names)
    sizes = magnitudes or {}
    return [
        compare(f"{op} {name}", actual[name], expected[name], measure[name], magnitude=sizes.get(name, 0.0))
        for name in expected
    ]


def results(
    function: Callable[..., Any], tensors: Mapping[str, Tensor | None], names: Sequence[str]
) -> dict[str, Tensor]:
    """The outputs of ``function(**tensors)`` by name, and the gradients of the inputs in ``names``."""
    inputs = {k: v.detach().requires_grad_(k in names) if v is not None else None for k, v in tensors.items()}
    found = function(**inputs)
    outputs = found if isinstance(found, tuple) else (found,)
    labels = ["output"] if len(outputs) == 1 else [f"output{i}" for i in range(len(outputs))]
    values = dict(zip(labels, (y.detach() for y in outputs), strict=True))
    if names:
        wanted = [x for k in names if (x := inputs[k]) is not None]
        grads = torch.autograd.grad(outputs, wanted, [_gradient(y) for y in outputs])
        values.update(zip((f"d{k}" for k in names), grads, strict=True))
    return values


def _gradient(y: Tensor) -> Tensor:
    """The gradient to start from: the same values for every dtype, rounded where every dtype holds them."""
    generator = torch.Generator().manual_seed(GRAD_SEED)
    return torch.randn(y.shape, generator=generator).bfloat16().to(y)
