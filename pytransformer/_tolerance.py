"""How wrong a kernel may be: the one rule of tolerance, for ``pytransformer verify``, the tests and the benchmarks.

The oracle is the reference in float64 on the same inputs, rounded to the kernel's dtype beforehand. What is
allowed is measured, not guessed: plain PyTorch computes the same thing in the same dtype (``_plain``), and a
kernel's error against the oracle, its maximum and its root mean square (RMS), may be 1.5 times plain's plus
what ONE more rounding of the result to its dtype costs. With eps the spacing of the dtype at 1, rounding x
is off by at most eps/2 |x|, and by 0.21 eps |x| in the RMS over a uniform position in its binade
(eps / 2 / sqrt(3), times 0.72 for where in the binade x lies), so

    max error <= 1.5 * plain's max error + 2 eps * RMS(expected)      one rounding of an element of 4 times the
                                                                      RMS, the largest of some thousand normal ones
    RMS error <= 1.5 * plain's RMS error + eps / 4 * RMS(expected)    one rounding of every element

The additive terms serve the calls where plain is exact or lucky. The maximum of one run is a lucky number too:
where plain is given in several spellings (``parity`` gives eager code and the reference run in the dtype), the
worst of them counts. Nothing here is ever widened to let a kernel pass. NaN and infinities must stand exactly
where the oracle has them. Where plain itself is not finite (a row that sees no key), it sets no bound and the
additive term alone holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

Plain: TypeAlias = "Tensor | Sequence[Tensor] | None"

PLAIN_FACTOR = 1.5
MAX_ROUNDING = 2.0  # in units of eps * RMS(expected)
RMS_ROUNDING = 0.25
# Elements that are judged together: on a CPU they stay in a cache, and torch takes no second thread for them; on a GPU
# each piece costs some launches.
_CHUNK = {"cpu": 2**15, "cuda": 2**24}


@dataclass(frozen=True)
class Comparison:
    """The verdict on one tensor: its errors, what was allowed, and why it fails if not by its size."""

    name: str
    max_error: float
    max_allowed: float
    rms_error: float
    rms_allowed: float
    mismatch: str | None = None

    @property
    def ok(self) -> bool:
        """Is every error within what is allowed?"""
        within = self.max_error <= self.max_allowed and self.rms_error <= self.rms_allowed
        return self.mismatch is None and within

    @property
    def ratio(self) -> float:
        """The larger of both errors over what it is allowed; at most 1 where the comparison is ``ok``."""
        if self.mismatch is not None:
            return float("inf")
        pairs = ((self.max_error, self.max_allowed), (self.rms_error, self.rms_allowed))
        return max(_ratio(error, allowed) for error, allowed in pairs)

    def __str__(self) -> str:
        if self.mismatch is not None:
            return f"{self.name}: {self.mismatch}"
        return (
            f"{self.name}: max error {self.max_error:.3g} (allowed {self.max_allowed:.3g}), "
            f"RMS error {self.rms_error:.3g} (allowed {self.rms_allowed:.3g})"
        )


def compare(name: str, actual: Tensor, expected: Tensor, plain: Plain = None, *, magnitude: float = 0.0) -> Comparison:
    """Judges ``actual`` against ``expected`` by the rule of this module.

    Args:
        name: what to call it in messages.
        actual: the kernel's result.
        expected: the oracle's, float64, of the same shape.
        plain: plain PyTorch's in the kernel's dtype, or several spellings of it; None leaves only the additive terms.
        magnitude: at least this is taken for RMS(expected): the size of the terms where they cancel, such as the
            gradient of a query that sees a single key, which is 0 by cancellation.
    """
    return judge(name, actual, expected, allowed(expected, plain, actual.dtype, magnitude=magnitude))


class Allowed(NamedTuple):
    """The largest error and the largest RMS error that pass."""

    max_error: float
    rms_error: float


def allowed(expected: Tensor, plain: Plain, dtype: torch.dtype, *, magnitude: float = 0.0) -> Allowed:
    """What the rule allows a result in ``dtype``, of which ``judge`` accepts floating-point ones only."""
    size = max(_errors(expected, expected.new_zeros(()).expand_as(expected))[1], magnitude)
    eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    spellings = () if plain is None else (plain,) if isinstance(plain, Tensor) else plain
    measured = [_errors(x, expected) for x in spellings]
    max_plain, rms_plain = (max(errors) for errors in zip((0.0, 0.0), *measured, strict=True))
    return Allowed(
        PLAIN_FACTOR * max_plain + MAX_ROUNDING * eps * size, PLAIN_FACTOR * rms_plain + RMS_ROUNDING * eps * size
    )


def judge(name: str, actual: Tensor, expected: Tensor, within: Allowed) -> Comparison:
    """The verdict on ``actual`` where what is allowed is known."""
    mismatch = _mismatch(actual, expected)
    if mismatch is not None:
        nan = float("nan")
        return Comparison(name, nan, nan, nan, nan, mismatch)
    max_error, rms_error = _errors(actual, expected)
    return Comparison(name, max_error, within.max_error, rms_error, within.rms_error)


def assert_close(name: str, actual: Tensor, expected: Tensor, plain: Plain = None, *, magnitude: float = 0.0) -> None:
    """Raises an AssertionError with all the numbers unless ``compare`` says ok."""
    found = compare(name, actual, expected, plain, magnitude=magnitude)
    if not found.ok:
        raise AssertionError(str(found))


def _mismatch(actual: Tensor, expected: Tensor) -> str | None:
    """What is wrong with ``actual`` apart from the size of its error, or None."""
    if actual.shape != expected.shape:
        return f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    if not actual.is_floating_point():
        return f"dtype {actual.dtype}, expected a floating-point one"
    wrong = sum(_misplaced(*parts) for parts in _chunks(actual, expected))
    return (
        f"{wrong} of {actual.numel()} elements are NaN or infinite where not expected, or not where expected"
        if wrong
        else None
    )


def _misplaced(x: Tensor, expected: Tensor) -> int:
    """How many elements are special where not expected, or not where expected."""
    if _all_finite(expected) and _all_finite(x):
        return 0
    finite, special = expected.isfinite(), x.to(torch.float64)
    agree = torch.where(finite, special.isfinite(), (special == expected) | (special.isnan() & expected.isnan()))
    return int((~agree).sum())


def _all_finite(x: Tensor) -> bool:
    return x.numel() == 0 or all(math.isfinite(bound.item()) for bound in x.aminmax())


def _errors(x: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest and the root mean square difference, over the elements that are finite in both."""
    largest = total = 0.0
    count = 0
    for part, wanted in _chunks(x, expected):
        difference = part.to(torch.float64) - wanted
        squares = difference.square().sum().item()
        if not math.isfinite(squares):
            difference = difference[part.isfinite() & wanted.isfinite()]
            squares = difference.square().sum().item()
        if difference.numel():
            low, high = difference.aminmax()
            largest = max(largest, -low.item(), high.item())
            total += squares
            count += difference.numel()
    return largest, math.sqrt(total / count) if count else 0.0


def _chunks(x: Tensor, expected: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in pieces: gradients of a vocabulary's table have tens of millions of elements."""
    size = _CHUNK.get(x.device.type, 2**24)
    pieces = (y.reshape(-1).split(size) for y in (x, expected))  # type: ignore[no-untyped-call]
    yield from zip(*pieces, strict=True)


def _ratio(error: float, allowed: float) -> float:
    if error == 0:
        return 0.0
    return error / allowed if allowed > 0 else float("inf")
