"""What may be said of samples: medians, bootstrap intervals, and verdicts that stay below the noise.

A ratio is that of the medians of samples taken in the same rounds, with the 95% interval of a bootstrap over
rounds. Where an interval holds the bound that a verdict turns on, the verdict is "cannot tell".

Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13 (percentile intervals).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

RESAMPLES = 1000
TOLERANCE = 0.05  # two runs whose times differ by less do not differ
DRIFT = 0.02  # the same code differs by this between processes (where its memory lies), whatever one process shows
MOST_NOISE = 0.10  # an interval wider than this either way gives no verdict on two runs


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


def median(values: Sequence[float]) -> float:
    """The median; the mean of the middle two where the count is even."""
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """median(numerator) / median(denominator) of samples that were taken in the same rounds."""
    above, below = _resampled(numerator, denominator)
    return _ratio(median(numerator) / median(denominator), above / below)


def over_median(numerator: float, samples: Sequence[float]) -> Ratio:
    """numerator / median(samples)."""
    return _ratio(numerator / median(samples), numerator / _resampled(samples)[0])


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


def target_verdict(found: Ratio, target: float | None) -> str:
    """``met``, ``missed`` or ``cannot tell``; without a target ``faster``, ``slower`` or ``cannot tell``."""
    above, below = ("faster", "slower") if target is None else ("met", "missed")
    bound = 1.0 if target is None else target
    if found.low >= bound:
        return above
    return below if found.high < bound else "cannot tell"


def worst_verdict(verdicts: Sequence[str]) -> str:
    """Of several targets of one row: missed where one is, met where all are."""
    return next((v for v in ("missed", "cannot tell") if v in verdicts), "met")


def change_verdict(found: Ratio, tolerance: float = TOLERANCE) -> str:
    """``slower``, ``faster``, ``no difference`` or ``cannot tell``, for the time after over the time before.

    A difference is one beyond ``tolerance`` whose interval, with ``DRIFT``, lies on one side of 1.
    """
    if found.value > 1 + tolerance and found.low > 1 + DRIFT:
        return "slower"
    if found.value < 1 - tolerance and found.high < 1 - DRIFT:
        return "faster"
    return "cannot tell" if found.noise > MOST_NOISE else "no difference"
