"""Measuring: providers in turn, in random order, on a machine that has nothing else to do.

Providers that are timed one after the other meet different machines: clocks, neighbours and caches drift. Here
each round times every provider once, in a random order, so drift meets all of them. A sample is the mean of as
many calls as fill ``SAMPLE_SECONDS``, in wall time and in the CPU time of the process. A sample in which the
process waited for a core that another one had, or that the hypervisor had taken, was not of this library: its
round is kept, flagged, and taken again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from pytransformer.benchmarks._contention import waited_seconds

SAMPLE_SECONDS = 0.004
LEAST_ROUNDS, MOST_ROUNDS = 6, 200
BUSY_FRACTION = 0.05  # of a sample's wall time spent waiting for a core
MOST_EXTRA = 1.0  # rounds are retaken for this times the row's own time, at most
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


def measure(
    providers: Mapping[str, Provider], seconds: float, seed: int = 0, flush: Callable[[], Any] | None = None
) -> Timing:
    """Times every provider for ``seconds`` altogether, or for ``LEAST_ROUNDS`` where these take longer.

    ``flush`` empties the caches before each sample, which is then of a single call.
    """
    order = random.Random(seed)
    timing = Timing({name: Samples(1 if flush else _calls(run)) for name, run in providers.items()})
    start = time.perf_counter()
    while not _enough(timing, time.perf_counter() - start, seconds):
        names = list(providers)
        order.shuffle(names)
        busy = False
        for name in names:
            if flush is not None:
                flush()
            found = timing.samples[name]
            sample = providers[name].sample(found.calls)
            found.wall.append(sample.wall / found.calls)
            found.cpu.append(sample.cpu / found.calls)
            busy |= sample.waited > BUSY_FRACTION * sample.wall
        timing.busy.append(busy)
    return timing


def _enough(timing: Timing, elapsed: float, seconds: float) -> bool:
    """Are these rounds all? Time lost to busy rounds is given back, up to ``MOST_EXTRA``."""
    rounds = len(timing.busy)
    if rounds < LEAST_ROUNDS:
        return False
    each = elapsed / rounds
    wanted = max(seconds, LEAST_ROUNDS * each)
    return timing.quiet * each >= wanted or elapsed >= wanted * (1 + MOST_EXTRA) or timing.quiet >= MOST_ROUNDS


def _calls(provider: Provider) -> int:
    """How many calls fill one sample; the provider has run before, when it was checked."""
    once = min(provider.sample(1).wall for _ in range(2))
    return max(1, round(SAMPLE_SECONDS / max(once, 1e-7)))


def flusher(device: str) -> Callable[[], Any]:
    """A function that leaves nothing of use in the caches."""
    other = torch.zeros(FLUSH_BYTES // 4, device=device)
    return lambda: other.add_(1)
