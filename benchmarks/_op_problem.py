"""The problem of one op: ours and torch's way to compute it, judged against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pytransformer import _plain, ops
from pytransformer._parity import alike, looser
from pytransformer._tolerance import Comparison, compare
from pytransformer.benchmarks._case import OURS, PEER, Problem, draw

Function = Callable[..., Any]
Oracle = tuple[list[Tensor], list[list[Tensor]]]
GRADIENT_SEED = 99  # no tensor's own
MORE_INPUTS = 6  # that plain PyTorch is measured on, at most, before ours is called wrong
NO_LUCK = 2.0  # times what is allowed: wrong on any input


@dataclass(frozen=True)
class OpProblem:
    """One call of one op; also the workload that a peer's adapter is given.

    Attributes:
        op: name of a function of ``pytransformer.ops``.
        direction: ``fwd``, ``bwd`` or ``fwd+bwd``.
        tensors: its tensor arguments by name.
        options: its other arguments.
        peer: plain PyTorch on the same tensors, as a person would write it.
        weights: the arguments that stay the same from call to call; an engine may pack them ahead.
        sampled: where a call is many independent problems (sequences, heads, rows), how many of them the check looks
            at: for each argument, and for the ``"output"``, the sizes that its leading dimensions are cut to.
            float64 on everything would take longer than the timing.
        random: dropout by torch's own random bits in the peer, so that the peer cannot be checked.
        traceable: engines that compile a graph may be given it.
    """

    op: str
    direction: str
    tensors: dict[str, Tensor | None]
    options: dict[str, Any]
    peer: Function
    weights: Sequence[str] = ()
    sampled: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    random: bool = False
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    traceable = True

    @property
    def names(self) -> list[str]:
        """The arguments whose gradients are asked for."""
        if self.direction == "fwd":
            return []
        return [k for k, v in self.tensors.items() if v is not None and v.is_floating_point()]

    @property
    def dtype(self) -> torch.dtype:
        """Of the floating-point arguments."""
        return next(v.dtype for v in self.tensors.values() if v is not None and v.is_floating_point())

    def problem(self) -> Problem:
        """Both providers and the check."""
        providers = {OURS: self.provider(getattr(ops, self.op), self.options), PEER: self.provider(self.peer)}
        return Problem(providers, self.check, self, random=frozenset([PEER]) if self.random else frozenset())

    def provider(self, function: Function, options: Mapping[str, Any] | None = None) -> Callable[[], Any]:
        """``function`` of the tensors by name, in this problem's direction.

        Forward: outputs alone, as in inference. Backward: the gradients of every floating-point argument, after
        a forward outside of the timing. Both: outputs and gradients, as in training.
        """
        extra = dict(options or {})
        if self.direction == "fwd":

            def forward() -> Any:
                with torch.no_grad():
                    return function(**self.tensors, **extra)

            return forward
        inputs = _leaves(self.tensors, self.names)
        wanted = [inputs[k] for k in self.names]
        if self.direction == "fwd+bwd":

            def both() -> Any:
                output = function(**inputs, **extra)
                return output.detach(), *torch.autograd.grad(output, wanted, self._gradient(output))

            return both
        output = function(**inputs, **extra)
        gradient = self._gradient(output)
        return lambda: torch.autograd.grad(output, wanted, gradient, retain_graph=True)

    def check(self, outputs: Any) -> list[Comparison]:
        """Every output against float64, by the rule of ``_tolerance``, with plain measured on more inputs as in
        ``_parity`` where the largest error of one run decides."""
        found = outputs if isinstance(outputs, tuple) else (outputs,)
        parts = [self._cut(name, x) for name, x in zip(self._results, found, strict=True)]
        verdicts = self._compare(parts, self._oracle)
        for tensors in islice(alike(self._looked_at), MORE_INPUTS):
            if all(c.ok or not c.ratio < NO_LUCK for c in verdicts):
                break
            oracle = self._measured(tensors)
            bounds = self._compare([plain[0] for plain in oracle[1]], oracle)
            verdicts = [looser(c, bound) for c, bound in zip(verdicts, bounds, strict=True)]
        return verdicts

    @property
    def _results(self) -> list[str]:
        return self.names if self.direction == "bwd" else ["output", *self.names]

    def _compare(self, parts: Sequence[Tensor], oracle: Oracle) -> list[Comparison]:
        labels = [name if name == "output" else f"d{name}" for name in self._results]
        return [compare(*each) for each in zip(labels, parts, *oracle, strict=True)]

    def _cut(self, name: str, x: Tensor) -> Tensor:
        """What the check looks at of an argument, of its gradient, or of the output."""
        return x[tuple(slice(size) for size in self.sampled.get(name, ()))]

    @cached_property
    def _looked_at(self) -> dict[str, Tensor | None]:
        return {k: None if v is None else self._cut(k, v) for k, v in self.tensors.items()}

    @cached_property
    def _oracle(self) -> Oracle:
        return self._measured(self._looked_at)

    def _measured(self, tensors: Mapping[str, Tensor | None]) -> Oracle:
        """The float64 results, and of each plain PyTorch's in its spellings."""
        wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in tensors.items()}
        reference, function = {**self.options, "backend": "reference"}, getattr(ops, self.op)
        spellings = [self._run(plain, tensors, self.options) for plain in _plain.spellings(self.op, self.options)]
        spellings.append(self._run(function, tensors, reference))
        return self._run(function, wide, reference), [list(each) for each in zip(*spellings, strict=True)]

    def _run(
        self, function: Function, tensors: Mapping[str, Tensor | None], options: Mapping[str, Any]
    ) -> list[Tensor]:
        inputs = _leaves(tensors, self.names)
        output = function(**inputs, **options)
        outputs = [] if self.direction == "bwd" else [output.detach()]
        if not self.names:
            return outputs
        return outputs + list(torch.autograd.grad(output, [inputs[k] for k in self.names], self._cut_gradient(output)))

    def _gradient(self, output: Tensor) -> Tensor:
        """Where the backward starts, drawn once: it is the caller's, and no part of what is timed. That of a scalar,
        a loss, is 1, as in ``loss.backward()``."""
        if output.dim() == 0:
            return torch.ones_like(output)
        if "gradient" not in self._kept:
            shape, dtype = output.shape, torch.bfloat16  # whose numbers every dtype holds
            self._kept["gradient"] = draw(*shape, dtype=dtype, seed=GRADIENT_SEED).to(output)
        gradient: Tensor = self._kept["gradient"]
        return gradient

    def _cut_gradient(self, output: Tensor) -> Tensor:
        """The same for what the check looks at."""
        return self._cut("output", self._gradient(output)).to(output)


def _leaves(tensors: Mapping[str, Tensor | None], names: list[str]) -> dict[str, Any]:
    return {k: v.detach().requires_grad_(k in names) if v is not None else None for k, v in tensors.items()}
