"""What a benchmark declares: its cases, each with the work it stands for and the providers that do it.

A case is a few plain values and ``build``, which allocates its tensors when the case's turn comes and returns
a ``Problem``: callables to time, and the check that each must pass before it is timed. A case can be pickled,
so that a peer in another process builds the same tensors from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pytransformer._tolerance import Comparison

OURS, PEER = "pytransformer", "torch"
LIMIT = "limit"  # among the providers of a row: the machine itself
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
SECONDS, BYTES = "seconds", "bytes"
PERIOD = 1_000_003


class AbsentError(Exception):
    """A case or provider cannot run here; the message says why."""


@dataclass
class Problem:
    """A case made real.

    Attributes:
        providers: what is timed, by name; each call returns its outputs as (a tuple of) tensors or None.
        check: how wrong the outputs of a call are, as ``Comparison``s; what comes out of ``providers`` goes in.
        workload: what a peer's adapter is given, where peers can take part.
        absent: providers that cannot run here, and why.
        random: providers whose random bits are their own, so that nothing can be compared.
        operations, bytes: the case's, where only its tensors tell them.
    """

    providers: dict[str, Callable[[], Any]]
    check: Callable[[Any], list[Comparison]]
    workload: Any = None
    absent: dict[str, str] = field(default_factory=dict)
    random: frozenset[str] = frozenset()
    operations: float | None = None
    bytes: float | None = None


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        op: the op's name, or the suite's where the row is no op.
        direction: ``fwd``, ``bwd`` or ``fwd+bwd``.
        dtype: as ``torch`` spells it, without the prefix.
        shape: the model and the variant, for people; at most 30 letters.
        operations: floating-point operations, by formula.
        bytes: each input read once and each output written once.
        build: allocates and returns the problem.
        sizes: every dimension by name.
        metric: ``seconds``, or ``bytes`` of memory at the peak.
        targets: by provider, the ratio of its time to ours that the project asks for.
        limit_target: the fraction of the machine's limit that it asks for.
        rate_target: the bytes a second and thread that it asks for.
        speed_target: the operations a second that it asks for.
        device: of the tensors.
        backend: whose kernels are ours; ``auto`` is the library's own choice.
        short: part of the default suite.
        alone: no peer but torch takes part.
    """

    op: str
    direction: str
    dtype: str
    shape: str
    operations: float
    bytes: float
    build: Callable[[], Problem]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    metric: str = SECONDS
    targets: Mapping[str, float] = field(default_factory=dict)
    limit_target: float | None = None
    rate_target: float | None = None
    speed_target: float | None = None
    device: str = "cpu"
    backend: str = "auto"
    short: bool = False
    alone: bool = False

    @property
    def name(self) -> str:
        suffix = "" if self.metric == SECONDS else f" {self.metric}"
        return f"{self.op} {self.direction} {self.dtype} {self.shape}{suffix}"


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype without its prefix."""
    return str(dtype).removeprefix("torch.")


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0, device: str = "cpu") -> Tensor:
    """Normal numbers, the same on every machine. They begin again after ``PERIOD``, a prime number: no two rows of a
    matrix are alike, and a vocabulary's table costs a copy instead of a second of drawing."""
    count = math.prod(shape)
    drawn = torch.randn(min(count, PERIOD), generator=torch.Generator().manual_seed(seed)) * scale
    repeated = drawn.to(device, dtype).repeat(-(-count // PERIOD))
    return repeated[:count].view(shape)
