"""Why self-attention, measured: one layer of each kind over growing n and d, and the exponents that follow.

The forms are those of table 1 of the paper: self-attention, self-attention restricted to a neighbourhood of r,
a recurrent layer (LSTM) and a convolution of width k; one sequence, float32. As in the paper's count, a layer of
self-attention is the attention alone, without its projections. Exponents are fitted to log time over the largest
sizes, where what a call costs by itself no longer shows.

Source: Vaswani et al., "Attention Is All You Need", 2017, sec. 4 and table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pytransformer._tolerance import Comparison, compare
from pytransformer.benchmarks import attention
from pytransformer.benchmarks._case import OURS, PEER, Case, Problem, draw
from pytransformer.benchmarks._figures import walls
from pytransformer.benchmarks._models import Model
from pytransformer.benchmarks._op_problem import OpProblem
from pytransformer.benchmarks._statistics import median

SELF, RESTRICTED, RECURRENT, CONVOLUTION = "self-attention", "restricted", "recurrent", "convolution"
HEAD_DIM = 64
NEIGHBOURHOOD, WIDTH = 128, 3  # r and k
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
WIDTHS = (64, 128, 256, 512)
FIXED_WIDTH, FIXED_LENGTH = 256, 512  # of the rows that vary the other
FITTED = 3  # the largest so many sizes


@dataclass(frozen=True)
class Form:
    """A kind of layer, with its row of the paper's table."""

    name: str
    per_layer: str
    sequential: str
    path: str
    exponents: tuple[int, int]  # of n and d


FORMS = (
    Form(SELF, "O(n²·d)", "O(1)", "O(1)", (2, 1)),
    Form(RESTRICTED, "O(r·n·d)", "O(1)", "O(n/r)", (1, 1)),
    Form(RECURRENT, "O(n·d²)", "O(n)", "O(n)", (1, 2)),
    Form(CONVOLUTION, "O(k·n·d²)", "O(1)", "O(logₖ n)", (1, 2)),
)


def cases() -> Iterator[Case]:
    """Each form over n at one d, and over d at one n."""
    for form in FORMS:
        for n in LENGTHS:
            yield case(form.name, n, FIXED_WIDTH)
        for d in WIDTHS:
            if d != FIXED_WIDTH:
                yield case(form.name, FIXED_LENGTH, d)


def case(form: str, n: int, d: int) -> Case:
    """One layer of width d over a sequence of n."""
    pairs = {SELF: n * n, RESTRICTED: n * min(n, NEIGHBOURHOOD)}
    products = {RECURRENT: 8 * n * d * d, CONVOLUTION: WIDTH * n * d * d}
    weights = {RECURRENT: 8 * d * d, CONVOLUTION: WIDTH * d * d}
    return Case(
        op="complexity",
        direction="fwd",
        dtype="float32",
        shape=f"{form} n={n} d={d}",
        operations=4 * pairs[form] * d if form in pairs else 2 * products[form],
        bytes=4 * (4 * n * d if form in pairs else 2 * n * d + weights[form]),
        build=partial(build, form, n, d),
        sizes={"form": form, "n": n, "d": d},
    )


def build(form: str, n: int, d: int) -> Problem:
    """Attention by ours and torch; the other forms are torch's alone."""
    if form == SELF:
        return attention.build("fwd", torch.float32, Model("", d // HEAD_DIM, HEAD_DIM, 0, 0), 1, n, "", "cpu")
    return _restricted(n, d) if form == RESTRICTED else _module(form, n, d)


def _restricted(n: int, d: int) -> Problem:
    sides = NEIGHBOURHOOD // 2
    tensors: dict[str, Tensor | None] = {
        name: draw(1, d // HEAD_DIM, n, HEAD_DIM, dtype=torch.float32, seed=seed)
        for seed, name in enumerate(("query", "key", "value"))
    }
    distance = torch.arange(n)[:, None] - torch.arange(n)
    keep = distance.abs() <= sides  # torch has no window: it is given the mask, and computes what the mask hides

    def peer(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value, keep)

    return OpProblem("attention", "fwd", tensors, {"window": (sides, sides)}, peer).problem()


def _module(form: str, n: int, d: int) -> Problem:
    torch.manual_seed(0)
    layer = nn.LSTM(d, d, batch_first=True) if form == RECURRENT else nn.Conv1d(d, d, WIDTH, padding="same")
    x = draw(1, n, d, dtype=torch.float32)
    kept: dict[str, Tensor] = {}

    def check(output: Tensor) -> list[Comparison]:
        if not kept:
            kept.update(plain=_output(layer, x))
            kept.update(expected=_output(layer.double(), x.double()))
            layer.float()
        return [compare(form, output, kept["expected"], kept["plain"])]

    return Problem({PEER: partial(_output, layer, x)}, check)


def _output(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = layer(x.mT) if isinstance(layer, nn.Conv1d) else layer(x)
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output


@dataclass(frozen=True)
class Fit:
    """A form's measured times and exponents by one provider; an exponent is None where too few sizes were timed."""

    form: Form
    provider: str
    over_n: list[tuple[int, float]]
    over_d: list[tuple[int, float]]

    @property
    def exponents(self) -> tuple[float | None, float | None]:
        """Of n and of d."""
        return exponent(self.over_n), exponent(self.over_d)


def fits(results: dict[str, Any]) -> list[Fit]:
    """Each form by each provider that timed it."""
    found = []
    for form in FORMS:
        for provider in (OURS, PEER):
            timed = [
                (row["sizes"]["n"], row["sizes"]["d"], median(walls(row)[provider]))
                for row in results["rows"]
                if row["op"] == "complexity" and row["sizes"]["form"] == form.name and provider in row["samples"]
            ]
            over_n = sorted((n, seconds) for n, d, seconds in timed if d == FIXED_WIDTH)
            over_d = sorted((d, seconds) for n, d, seconds in timed if n == FIXED_LENGTH)
            if over_n or over_d:
                found.append(Fit(form, provider, over_n, over_d))
    return found


def exponent(points: Sequence[tuple[int, float]]) -> float | None:
    """The slope of log time over log size, by least squares over the largest ``FITTED`` sizes."""
    last = [(math.log(size), math.log(seconds)) for size, seconds in sorted(points)[-FITTED:]]
    if len(last) < FITTED:
        return None
    middle_x, middle_y = (sum(column) / len(last) for column in zip(*last, strict=True))
    return sum((x - middle_x) * (y - middle_y) for x, y in last) / sum((x - middle_x) ** 2 for x, _ in last)


def print_fits(results: dict[str, Any], show: Callable[[str], Any] = print) -> None:
    """The paper's table with the measured exponents beside it."""
    show(f"{'layer':15}{'paper: per layer':>17}{'sequential':>12}{'path':>12}  measured")
    for fit in fits(results):
        form = fit.form
        n, d = ("?" if e is None else f"{e:.2f}" for e in fit.exponents)
        head = f"{form.name:15}{form.per_layer:>17}{form.sequential:>12}{form.path:>12}"
        show(f"{head}  n^{n} d^{d} {fit.provider.replace(OURS, 'ours')}")
