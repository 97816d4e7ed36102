"""Measuring: providers in turn, in random order, on a machine that has nothing else to do.

Providers that are timed one after the other meet different machines: clocks, neighbours and caches drift. Here
each round times every provider once, in a random order, so drift meets all of them. A sample is the mean of as
many calls as fill ``SAMPLE_SECONDS``, in wall time and in the CPU time of the process. A sample in which the
process waited for a core that another one had, or that the hypervisor had taken, was not of this library: its
round is kept, flagged, and taken again. Where peers have processes of their own, each waits until the others are
at rest. Rounds go on, up to a bound, until their ratios agree: a row that is quiet costs little, and a row that is
not gets what the others left.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch

from pytransformer.benchmarks._contention import wait_for_rest, waited_seconds
from pytransformer.benchmarks._statistics import standard_error

SAMPLE_SECONDS = 0.004
LEAST_ROUNDS, MOST_ROUNDS = 4, 200  # of a visit
BUSY_FRACTION = 0.05  # of a sample's wall time spent waiting for a core
WANTED_ERROR = 0.04  # standard error of a visit's ratio that is good enough
MOST_EXTRA = 0.5  # times a visit's own time that busy rounds and disagreement may cost besides
MOST_RETAKEN = 0.25  # of its rounds, where the least of them take longer than that
FLUSH_BYTES = 2**28


class Sample(NamedTuple):
    """Seconds of a number of calls together."""

    wall: float
    cpu: float
    waited: float = 0.0


class Provider(Protocol):
    """Something that can be timed: a callable of this process, or one that lives in another."""

    clock: str

    def __call__(self) -> Any: ...

    def sample(self, calls: int) -> Sample: ...


class Local:
    """A callable of this process."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run
        self.clock = "wall time"

    def __call__(self) -> Any:
        return self.run()

    def sample(self, calls: int) -> Sample:
        run, waited = self.run, waited_seconds()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(calls):
            run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return Sample(wall, cpu, waited_seconds() - waited)


@dataclass
class Samples:
    """Seconds a call, one entry a round."""

    calls: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


@dataclass
class Timing:
    """The samples of each provider, and which rounds were taken while the machine was busy."""

    samples: dict[str, Samples]
    busy: list[bool] = field(default_factory=list)

    @property
    def quiet(self) -> int:
        """How many rounds were not."""
        return self.busy.count(False)

    def error(self) -> float:
        """The standard error of the first provider's time in units of the second's, or of its time alone."""
        first, *others = (samples.wall for samples in self.samples.values())
        ratios = [a / b for a, b in zip(first, others[0], strict=True)] if others else first
        quiet = [x for x, busy in zip(ratios, self.busy, strict=True) if not busy]
        return standard_error(quiet if len(quiet) >= LEAST_ROUNDS else ratios)


def measure(
    providers: Mapping[str, Provider],
    seconds: float,
    seed: int = 0,
    flush: Callable[[], Any] | None = None,
    calls: Mapping[str, int] = MappingProxyType({}),
) -> Timing:
    """One visit: times every provider for ``seconds`` altogether, or for ``LEAST_ROUNDS`` where these take longer.

    ``flush`` empties the caches before each sample, which is then of a single call. ``calls`` are those of a sample,
    where an earlier visit has found how many fill it.
    """
    order = random.Random(seed)
    counts = {name: 1 if flush else calls.get(name) or _calls(run) for name, run in providers.items()}
    timing = Timing({name: Samples(count) for name, count in counts.items()})
    alone = all(isinstance(run, Local) for run in providers.values())
    start = time.perf_counter()
    while not _enough(timing, time.perf_counter() - start, seconds):
        names = list(providers)
        order.shuffle(names)
        busy = False
        for name in names:
            if flush is not None:
                flush()
            if not alone:
                wait_for_rest()
            found = timing.samples[name]
            sample = providers[name].sample(found.calls)
            found.wall.append(sample.wall / found.calls)
            found.cpu.append(sample.cpu / found.calls)
            busy |= sample.waited > BUSY_FRACTION * sample.wall
        timing.busy.append(busy)
    return timing


def _enough(timing: Timing, elapsed: float, seconds: float) -> bool:
    """Are these rounds all? What busy rounds and disagreement cost is given back, within bounds."""
    rounds = len(timing.busy)
    if rounds < LEAST_ROUNDS:
        return False
    each = elapsed / rounds
    wanted = max(seconds, LEAST_ROUNDS * each)
    longest = max(seconds * (1 + MOST_EXTRA), wanted * (1 + MOST_RETAKEN))
    if elapsed >= longest or timing.quiet >= MOST_ROUNDS:
        return True
    return timing.quiet * each >= wanted and timing.error() <= WANTED_ERROR


def _calls(provider: Provider) -> int:
    """How many calls fill one sample; the provider has run before, when it was checked."""
    once = provider.sample(1).wall
    if once < SAMPLE_SECONDS:
        once = min(once, provider.sample(1).wall)
    return max(1, round(SAMPLE_SECONDS / max(once, 1e-7)))


def flusher(device: str) -> Callable[[], Any]:
    """A function that leaves nothing of use in the caches."""
    other = torch.zeros(FLUSH_BYTES // 4, device=device)
    return lambda: other.add_(1)
