"""What a benchmark declares: its cases, each with the work it stands for and the providers that do it.

A case is a few plain values and ``build``, which allocates its tensors when the case's turn comes and returns
a ``Problem``: callables to time, and the check that each must pass before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pytransformer import _plain, ops
from pytransformer._tolerance import Comparison, compare

OURS, PEER = "pytransformer", "torch"

Outputs = Mapping[str, Tensor]


class AbsentError(Exception):
    """A case or provider cannot run here; the message says why."""


@dataclass
class Problem:
    """A case made real.

    Attributes:
        providers: what is timed, by name; each call returns its outputs as (a tuple of) tensors or None.
        check: how wrong the outputs of a call are, as ``Comparison``s; what comes out of ``providers`` goes in.
        absent: providers that cannot run here, and why.
        operations, bytes: the case's, where only its tensors tell them.
    """

    providers: dict[str, Callable[[], Any]]
    check: Callable[[Any], list[Comparison]]
    absent: dict[str, str] = field(default_factory=dict)
    operations: float | None = None
    bytes: float | None = None


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        op: the op's name, or ``models``.
        direction: ``fwd`` or ``bwd``.
        dtype: as ``torch`` spells it, without the prefix.
        shape: the sizes and the variant, for people.
        operations: floating-point operations, by formula.
        bytes: each input read once and each output written once.
        build: allocates and returns the problem.
        target: the speedup over torch that the project asks for.
        short: part of the default suite.
    """

    op: str
    direction: str
    dtype: str
    shape: str
    operations: float
    bytes: float
    build: Callable[[], Problem]
    target: float | None = None
    short: bool = True

    @property
    def name(self) -> str:
        return f"{self.op} {self.direction} {self.dtype} {self.shape}"


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without its prefix."""
    return str(dtype).removeprefix("torch.")


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


@dataclass(frozen=True)
class OpProblem:
    """The problem of one op: ours and torch's way to compute it, judged against the float64 reference.

    Attributes:
        op: name of a function of ``pytransformer.ops``.
        tensors: its tensor arguments by name.
        options: its other arguments.
        peer: plain PyTorch on the same tensors, as a person would write it.
        sampled: arguments whose leading dimension is a batch of independent problems. Where given, the check
            looks at the first ``count`` of them only; float64 on everything would take longer than the timing.
        count: how many.
    """

    op: str
    tensors: dict[str, Tensor | None]
    options: dict[str, Any]
    peer: Callable[..., Tensor]
    sampled: Sequence[str] = ()
    count: int = 1

    def forward(self) -> Problem:
        """Outputs alone, as in inference."""

        def provider(function: Callable[..., Any], options: dict[str, Any]) -> Callable[[], Any]:
            def call() -> Any:
                with torch.no_grad():
                    return function(**self.tensors, **options)

            return call

        return self._problem({OURS: provider(getattr(ops, self.op), self.options), PEER: provider(self.peer, {})}, [])

    def backward(self) -> Problem:
        """The gradients of every floating-point argument, after a forward outside of the timing."""
        names = [k for k, v in self.tensors.items() if v is not None and v.is_floating_point()]

        def provider(function: Callable[..., Any], options: dict[str, Any]) -> Callable[[], Any]:
            inputs = _leaves(self.tensors, names)
            output = function(**inputs, **options)
            wanted = [inputs[k] for k in names]
            gradient = _gradient(output)
            return lambda: torch.autograd.grad(output, wanted, gradient, retain_graph=True)

        ours = provider(getattr(ops, self.op), self.options)
        return self._problem({OURS: ours, PEER: provider(self.peer, {})}, names)

    def _problem(self, providers: dict[str, Callable[[], Any]], names: list[str]) -> Problem:
        expected, plain = self._oracle(names)
        labels = [f"d{name}" for name in names] or ["output"]

        def check(outputs: Any) -> list[Comparison]:
            found = outputs if isinstance(outputs, tuple) else (outputs,)
            parts = [x[: self.count] for x in found] if self.sampled else found
            return [compare(*each) for each in zip(labels, parts, expected, plain, strict=True)]

        return Problem(providers, check)

    def _oracle(self, names: list[str]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The float64 results of what the check looks at, and plain PyTorch's."""
        tensors = {k: v[: self.count] if k in self.sampled and v is not None else v for k, v in self.tensors.items()}
        wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in tensors.items()}
        runs = [
            _run(getattr(ops, self.op), inputs, {**self.options, **more}, names)
            for inputs, more in ((wide, {"backend": "reference"}), (tensors, {"backend": "reference"}))
        ]
        plain = _run(getattr(_plain, self.op), tensors, self.options, names)
        return runs[0], [list(pair) for pair in zip(runs[1], plain, strict=True)]


def _run(
    function: Callable[..., Any],
    tensors: Mapping[str, Tensor | None],
    options: Mapping[str, Any],
    names: list[str],
) -> list[Tensor]:
    inputs = _leaves(tensors, names)
    output = function(**inputs, **options)
    if not names:
        return [output.detach()]
    return list(torch.autograd.grad(output, [inputs[k] for k in names], _gradient(output)))


def _leaves(tensors: Mapping[str, Tensor | None], names: list[str]) -> dict[str, Any]:
    return {k: v.detach().requires_grad_(k in names) if v is not None else None for k, v in tensors.items()}


def _gradient(output: Tensor) -> Tensor:
    """Where the backward starts: numbers that every dtype holds, and a prefix of the batch begins the same."""
    values = torch.randn(output.numel(), generator=torch.Generator().manual_seed(1))
    return values.bfloat16().to(output.dtype).reshape(output.shape)
