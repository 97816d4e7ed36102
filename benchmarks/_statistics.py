"""What may be said of samples: ratios, bootstrap intervals, and verdicts that stay below the noise.

On a shared machine a kernel runs at 60% of its best for some seconds and at 95% for the next, and no time of it
alone means much. But a round times ours and the other within one such moment: a ratio is the middle of the rounds'
own ratios (the mean of the middle half of their logarithms), with the 95% interval of a bootstrap over rounds. Where
an interval holds the bound that a verdict turns on, the verdict is "cannot tell".

Two runs are compared by how that ratio changed: the other's code is the same in both. A run visits a row three times
or more, a minute apart, with tensors that lie elsewhere. What two visits of the same code differ by beyond the noise of
their rounds is what two runs of the same code will differ by too: this drift is taken from all rows together, and
widens each interval. Of seventy rows that did not change, three would still lie outside of their 95% interval: a
difference is called only where it is rarer than so many rows explain.

Sources: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13 (percentile intervals); Wilcox,
"Introduction to Robust Estimation and Hypothesis Testing", 2012, sec. 3.3 (trimmed means and their errors);
Benjamini, Hochberg, "Controlling the False Discovery Rate", 1995 (many rows at once).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

RESAMPLES = 1000
TRIMMED = 0.25  # of the rounds, at either end
TOLERANCE = 0.05  # two runs whose times differ by less do not differ
LEAST_DRIFT = 0.02  # what is taken where few rows tell, or less than this
LEAST_ROWS = 8  # that tell of drift
MOST_NOISE = 0.15  # an interval wider than this either way gives no verdict on two runs
FALSE_DIFFERENCES = 0.05  # of those called, at most
_EXPLAINED, _NORMAL_EXPLAINED = 0.8, 1.2816  # of visits; what a normal number's absolute value stays below as often
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Ratio:
    """A ratio and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def noise(self) -> float:
        """Half the interval's width, as a fraction of the value."""
        return (self.high - self.low) / 2 / self.value

    @property
    def chance(self) -> float:
        """Of a value as far from 1 where the truth is 1."""
        error = math.log(self.high / self.low) / (2 * _NORMAL_95)
        distance = abs(math.log(self.value))
        return math.erfc(distance / error / math.sqrt(2)) if error > 0 else float(distance == 0)


@dataclass(frozen=True)
class Rounds:
    """The rounds of a row: each provider's times, and the visit of each round (all of one where left out)."""

    walls: Mapping[str, Sequence[float]]
    visits: Sequence[int] = field(default_factory=tuple)

    def logarithms(self, ours: str, peer: str | None) -> list[Tensor]:
        """By visit: the logarithm of our time in each round, in units of the peer's where there is one."""
        found = _logs(self.walls[ours])
        found = found if peer is None else found - _logs(self.walls[peer])
        if not self.visits:
            return [found]
        visits = torch.tensor(self.visits)
        return [found[visits == visit] for visit in sorted(set(self.visits))]


def median(values: Sequence[float]) -> float:
    """The median; the mean of the middle two where the count is even."""
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
    """The middle of numerator / denominator, of samples that were taken in the same rounds."""
    logs = _logs(numerator) - _logs(denominator)
    return _ratio(_middle(logs).exp().item(), _resampled(logs).exp())


def over_median(numerator: float, samples: Sequence[float]) -> Ratio:
    """numerator / median(samples)."""
    values = torch.tensor(samples, dtype=torch.float64)
    resampled = values[_rounds(len(values))].quantile(0.5, dim=1)
    return _ratio(numerator / median(samples), numerator / resampled)


def change(before: Rounds, after: Rounds, ours: str, peer: str, drift: float = LEAST_DRIFT) -> Ratio:
    """Our time after over our time before, each in units of the peer's time in its own rounds.

    The peer's code is the same in both runs, so what changed about the machine cancels. Without the peer in both runs
    it is the plain ratio of our times. ``drift`` is the standard deviation of a visit.
    """
    unit = peer if peer in before.walls and peer in after.walls else None
    old, new = before.logarithms(ours, unit), after.logarithms(ours, unit)
    value = _mean([_middle(x) for x in new]) - _mean([_middle(x) for x in old])
    resampled = _mean([_resampled(x, seed) for seed, x in enumerate(new)])
    resampled = resampled - _mean([_resampled(x, -1 - seed) for seed, x in enumerate(old)])
    moved = torch.randn(RESAMPLES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    resampled = resampled + moved * drift * math.sqrt(1 / len(old) + 1 / len(new))
    return _ratio(value.exp().item(), resampled.exp())


def drift(rows: Sequence[Rounds], ours: str, peer: str) -> float:
    """The standard deviation of a visit's ratio beyond the noise of its rounds: what explains the differences between
    visits of a row. At least ``LEAST_DRIFT``, and this where fewer than ``LEAST_ROWS`` pairs of visits tell."""
    visits = [row.logarithms(ours, peer) for row in rows if peer in row.walls]
    pairs = [pair for row in visits for pair in pairwise(row)]
    if len(pairs) < LEAST_ROWS:
        return LEAST_DRIFT
    apart = torch.stack([(_middle(a) - _middle(b)).abs() for a, b in pairs])
    noise = torch.stack([_resampled(a).var() + _resampled(b, 1).var() for a, b in pairs])
    low, high = LEAST_DRIFT, 1.0
    while high - low > 1e-4:
        guess = (low + high) / 2
        explained = (apart / (2 * guess**2 + noise).sqrt()).quantile(_EXPLAINED) <= _NORMAL_EXPLAINED
        low, high = (low, guess) if explained else (guess, high)
    return low


def _logs(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log()


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def _middle(values: Tensor) -> Tensor:
    """The mean of the middle half, along the last dimension."""
    count = values.shape[-1]
    cut = int(count * TRIMMED)
    return values.sort(-1).values.narrow(-1, cut, count - 2 * cut).mean(-1)


def standard_error(values: Sequence[float]) -> float:
    """Of the middle of ``values``' logarithms, by their winsorised variance: cheap enough to ask after every round."""
    logs = sorted(map(math.log, values))
    count, cut = len(logs), int(len(logs) * TRIMMED)
    if count - 2 * cut < 2:
        return math.inf
    kept = [min(max(x, logs[cut]), logs[count - 1 - cut]) for x in logs]
    mean = sum(kept) / count
    variance = sum((x - mean) ** 2 for x in kept) / (count - 1)
    return math.sqrt(variance / count) / (1 - 2 * TRIMMED)


def _rounds(count: int, seed: int = 0) -> Tensor:
    """Resampled rounds, [RESAMPLES,count]."""
    return torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(seed))


def _resampled(logs: Tensor, seed: int = 0) -> Tensor:
    """Middles of resampled rounds, [RESAMPLES]; spread a little, as few rounds are less alike than their resamples."""
    count = len(logs)
    spread = math.sqrt(count / max(count - 1, 1))
    centre = _middle(logs)
    return centre + (_middle(logs[_rounds(count, seed)]) - centre) * spread


def _ratio(value: float, resampled: Tensor) -> Ratio:
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


def rarest(chances: Sequence[float]) -> float:
    """The chance up to which a row of so many differs: ``FALSE_DIFFERENCES`` of the rows called are expected false."""
    ordered = sorted(chances)
    allowed = [FALSE_DIFFERENCES * (rank + 1) / len(ordered) for rank in range(len(ordered))]
    return max((a for chance, a in zip(ordered, allowed, strict=True) if chance <= a), default=0.0)


def change_verdict(found: Ratio, tolerance: float = TOLERANCE, chance: float = FALSE_DIFFERENCES) -> str:
    """``slower``, ``faster``, ``no difference`` or ``cannot tell``, for the time after over the time before.

    A difference is one beyond ``tolerance`` that is no likelier than ``chance`` where nothing changed.
    """
    if abs(math.log(found.value)) > math.log1p(tolerance) and found.chance <= chance:
        return "slower" if found.value > 1 else "faster"
    return "cannot tell" if found.noise > MOST_NOISE else "no difference"
