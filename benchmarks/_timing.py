"""Measuring: providers in turn, in random order, and what may be said of the samples.

Providers that are timed one after the other meet different machines: clocks, neighbours and caches drift. Here
each round times every provider once, in a random order, so drift meets all of them. A sample is the mean of as
many calls as fill ``SAMPLE_SECONDS``; both wall time and the process's CPU time are kept. A speedup is the ratio
of the medians, with the 95% interval of a bootstrap over rounds: what is not outside of it is not claimed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

SAMPLE_SECONDS = 0.004
LEAST_ROUNDS, MOST_ROUNDS = 6, 200
RESAMPLES = 1000
NO_DIFFERENCE = 0.05  # two runs whose ratio surely lies within 5% of 1 do not differ
LEAST_DIFFERENCE = 0.03  # a difference below 3% between two runs is not called one


@dataclass
class Samples:
    """Seconds a call, one entry a round."""

    calls: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.wall)


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def noise(self) -> float:
        """Half the interval's width, as a fraction of the value."""
        return (self.high - self.low) / 2 / self.value


def measure(providers: Mapping[str, Callable[[], Any]], seconds: float, seed: int = 0) -> dict[str, Samples]:
    """Times every provider for ``seconds`` altogether, or for ``LEAST_ROUNDS`` where these take longer."""
    order = random.Random(seed)
    found = {name: Samples(_calls(run)) for name, run in providers.items()}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and time.perf_counter() < end):
        names = list(providers)
        order.shuffle(names)
        for name in names:
            _sample(providers[name], found[name])
        rounds += 1
    return found


def _calls(run: Callable[[], Any]) -> int:
    """How many calls fill one sample; the provider has run before, when it was checked."""
    start = time.perf_counter()
    run()
    return max(1, round(SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-7)))


def _sample(run: Callable[[], Any], samples: Samples) -> None:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(samples.calls):
        run()
    samples.wall.append((time.perf_counter() - wall) / samples.calls)
    samples.cpu.append((time.process_time() - cpu) / samples.calls)


def median(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """median(numerator) / median(denominator) of samples that were taken in the same rounds."""
    above, below = _resampled(numerator, denominator)
    return _ratio(median(numerator) / median(denominator), above / below)


def change(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], ours: str, peer: str) -> Ratio:
    """Our time after over our time before, each in units of the peer's time in its own run.

    The peer's code is the same in both runs, so what changed about the machine cancels. Without the peer in
    both runs it is the plain ratio of our times.
    """
    if peer not in before or peer not in after:
        new, old = _resampled(after[ours])[0], _resampled(before[ours], seed=1)[0]
        return _ratio(median(after[ours]) / median(before[ours]), new / old)
    new_ours, new_peer = _resampled(after[ours], after[peer])
    old_ours, old_peer = _resampled(before[ours], before[peer], seed=1)
    value = median(after[ours]) / median(after[peer]) / (median(before[ours]) / median(before[peer]))
    return _ratio(value, (new_ours / new_peer) / (old_ours / old_peer))


def _resampled(*series: Sequence[float], seed: int = 0) -> list[torch.Tensor]:
    """Medians of resampled rounds, [RESAMPLES] for each series; the same rounds in all of them."""
    rounds = min(len(values) for values in series)
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(rounds, (RESAMPLES, rounds), generator=generator)
    return [torch.tensor(values[:rounds], dtype=torch.float64)[index].quantile(0.5, dim=1) for values in series]


def _ratio(value: float, resampled: torch.Tensor) -> Ratio:
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Ratio(value, low, high)


def target_verdict(speedup: Ratio, target: float | None) -> str:
    """``met``, ``missed`` or ``cannot tell``; without a target ``faster``, ``slower`` or ``cannot tell``."""
    above, below = ("faster", "slower") if target is None else ("met", "missed")
    bound = 1.0 if target is None else target
    if speedup.low >= bound:
        return above
    return below if speedup.high < bound else "cannot tell"


def change_verdict(found: Ratio) -> str:
    """``slower``, ``faster``, ``no difference`` or ``cannot tell``, for the time after over the time before."""
    if found.low > 1 and found.value > 1 + LEAST_DIFFERENCE:
        return "slower"
    if found.high < 1 and found.value < 1 - LEAST_DIFFERENCE:
        return "faster"
    within = found.low > 1 - NO_DIFFERENCE and found.high < 1 + NO_DIFFERENCE
    return "no difference" if within else "cannot tell"
