"""One call of an op computed three ways: by a backend, by the float64 oracle and by plain PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pytransformer import _plain, ops
from pytransformer._tolerance import Comparison, compare

GRAD_SEED = 20170612  # of the gradients that backward passes start from
NOT_FUSED = "reference"


class Parity:
    """A call of ``ops.<op>`` with its oracle and its measure of error, which any number of backends are judged by.

    Args:
        op: name of a function of ``pytransformer.ops``.
        tensors: its tensor arguments by name; the floating ones are differentiated.
        options: its other arguments; a ``seed`` where there is dropout.
        backward: also compute the gradients, named ``d<argument>``.
        magnitudes: by result, the ``magnitude`` of ``_tolerance.compare``.
    """

    def __init__(
        self,
        op: str,
        tensors: Mapping[str, Tensor | None],
        options: Mapping[str, Any] | None = None,
        *,
        backward: bool = True,
        magnitudes: Mapping[str, float] | None = None,
    ) -> None:
        self.op, self.tensors, self.options = op, tensors, dict(options or {})
        self.magnitudes = magnitudes or {}
        floating = [k for k, v in tensors.items() if v is not None and v.is_floating_point()]
        self.names = floating if backward else []
        wide = {k: v.double() if k in floating and v is not None else v for k, v in tensors.items()}
        self.expected = self._run(getattr(ops, op), wide, backend=NOT_FUSED)
        self.plain = (
            *(self._run(function, tensors) for function in _plain.spellings(op, self.options)),
            self._run(getattr(ops, op), tensors, backend=NOT_FUSED),
        )

    def judge(self, backend: str) -> list[Comparison]:
        """The verdict on each output, and on each gradient."""
        with unwritten_is_nan():
            actual = self._run(getattr(ops, self.op), self.tensors, backend=backend)
        verdicts = self._compare(actual)
        for other in alike(self.tensors):
            if all(c.ok or c.mismatch is not None for c in verdicts):
                break
            verdicts = [looser(c, self._bounds(other)[c.name]) for c in verdicts]
        return verdicts

    def _compare(self, actual: Mapping[str, Tensor]) -> list[Comparison]:
        return [
            compare(
                f"{self.op} {name}",
                actual[name],
                self.expected[name],
                [plain[name] for plain in self.plain],
                magnitude=self.magnitudes.get(name, 0.0),
            )
            for name in self.expected
        ]

    def _bounds(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Comparison]:
        """What is allowed on other inputs, by the name of the result."""
        other = Parity(self.op, tensors, self.options, backward=bool(self.names), magnitudes=self.magnitudes)
        return {c.name: c for c in other._compare(other.plain[0])}

    def _run(
        self, function: Callable[..., Any], tensors: Mapping[str, Tensor | None], **more: Any
    ) -> dict[str, Tensor]:
        return results(lambda **inputs: function(**inputs, **self.options, **more), tensors, self.names)


def alike(tensors: Mapping[str, Tensor | None]) -> Iterator[dict[str, Tensor | None]]:
    """Other inputs of the same distribution: the floating tensors rolled in a dimension, the first negated too.

    They are rolled alike, which changes the order of sums, and each further than the one before it, which changes what
    is summed: query and key, rolled alike, give the same scores again. The largest error of plain PyTorch over the
    elements of one run is a matter of luck. Where it decides, plain is measured on these as well, and the worst of
    what it allows holds.
    """
    names = [name for name, x in tensors.items() if x is not None and x.is_floating_point()]
    for further, dim, shift, sign in product((0, 1), (-1, -2, 0), (1, 3, 8), (1, -1)):
        changed = {
            n: x.roll(shift * (1 + further * i), max(dim, -x.dim()))
            for i, n in enumerate(names)
            if (x := tensors[n]) is not None
        }
        changed[names[0]] = sign * changed[names[0]]
        yield {**tensors, **changed}


def looser(c: Comparison, other: Comparison) -> Comparison:
    """``c``, held to the looser of both bounds."""
    return replace(
        c,
        max_allowed=max(c.max_allowed, other.max_allowed),
        rms_allowed=max(c.rms_allowed, other.rms_allowed),
    )


def parity(
    op: str,
    tensors: Mapping[str, Tensor | None],
    options: Mapping[str, Any] | None = None,
    *,
    backend: str = "auto",
    backward: bool = True,
    magnitudes: Mapping[str, float] | None = None,
) -> list[Comparison]:
    """Judges one call on one backend; the arguments are those of ``Parity``."""
    return Parity(op, tensors, options, backward=backward, magnitudes=magnitudes).judge(backend)


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


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Fresh memory holds NaN in the block: what a kernel leaves unwritten cannot pass as an earlier result."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _gradient(y: Tensor) -> Tensor:
    """The gradient to start from: the same values for every dtype, rounded where every dtype holds them."""
    generator = torch.Generator().manual_seed(GRAD_SEED)
    return torch.randn(y.shape, generator=generator, device="cpu").bfloat16().to(y)
