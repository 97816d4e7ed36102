"""The report's plots as inline SVG: they take the page's colours, print sharply and need nothing from elsewhere.

Colours are classes of the page (``report.html``); every mark carries its numbers in a ``<title>``, which browsers
show under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from pytransformer.benchmarks._case import BYTES, OURS, PEER
from pytransformer.benchmarks._figures import figures, walls
from pytransformer.benchmarks._peaks import copy_rate
from pytransformer.benchmarks._statistics import median
from pytransformer.benchmarks.complexity import FORMS, Fit

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 16, 46
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis between two values."""

    low: float
    high: float
    label: str

    @classmethod
    def around(cls, values: Iterable[float], label: str) -> Axis:
        """From a little below the least to a little above the largest."""
        found = list(values)
        return cls(min(found) / 1.5, max(found) * 1.5, label)

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))

    def ticks(self) -> list[float]:
        """Powers of ten; with 2 and 5 of each where the axis is short."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps = (1,) if last - first > 3 else (1, 2, 5)
        every = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        return [value for value in every if self.low <= value <= self.high]


class Plot:
    """Two axes and what is drawn between them."""

    def __init__(self, x: Axis, y: Axis, name: str) -> None:
        self.x, self.y, self.name = x, y, name
        self.parts: list[str] = []
        for value in x.ticks():
            at = self.across(value)
            self.parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            self.text(at, HEIGHT - BOTTOM + 16, number(value), "tick", "middle")
        for value in y.ticks():
            at = self.up(value)
            self.parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
            self.text(LEFT - 8, at + 4, number(value), "tick", "end")
        self.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x.label, "label", "middle")
        middle = (TOP + HEIGHT - BOTTOM) / 2
        self.parts.append(
            f'<text class="label" text-anchor="middle" transform="translate(14 {middle}) rotate(-90)">{y.label}</text>'
        )

    def across(self, value: float) -> float:
        return round(LEFT + self.x.place(value) * (WIDTH - LEFT - RIGHT), 1)

    def up(self, value: float) -> float:
        return round(HEIGHT - BOTTOM - self.y.place(value) * (HEIGHT - TOP - BOTTOM), 1)

    def text(self, x: float, y: float, text: str, kind: str, anchor: str = "start") -> None:
        self.parts.append(f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, points: Sequence[Point], kind: str) -> None:
        places = " ".join(f"{self.across(x)},{self.up(y)}" for x, y in points)
        self.parts.append(f'<polyline class="{kind}" points="{places}"/>')

    def dot(self, x: float, y: float, kind: str, told: str) -> None:
        place = f'cx="{self.across(x)}" cy="{self.up(y)}"'
        self.parts.append(f'<circle class="{kind}" {place} r="4.5"><title>{escape(told)}</title></circle>')

    def svg(self) -> str:
        head = f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.name)}">'
        return head + "".join(self.parts) + "</svg>"


def number(value: float) -> str:
    """A tick's label."""
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    mantissa, power = f"{value:.0e}".split("e")
    head = "" if mantissa == "1" else f"{mantissa}·"
    return f"{head}10{str(int(power)).translate(SUPERSCRIPTS)}"


def roofline(rows: Sequence[dict[str, Any]], limits: dict[str, Any]) -> str | None:
    """What each row reaches, over its operations for each byte, under the machine's roofs; None without rows."""
    timed = [row for row in rows if row["metric"] != BYTES and OURS in row["samples"] and row["operations"]]
    if not timed:
        return None
    points = []
    for row in timed:
        times = {name: median(wall) for name, wall in walls(row).items() if name in (OURS, PEER)}
        reached = {name: row["operations"] / seconds / 1e9 for name, seconds in times.items()}
        points.append((row, row["operations"] / row["bytes"], reached))
    roofs = _roofs(timed, limits)
    x = Axis.around((at for _, at, _ in points), "operations a byte")
    reaches = [value for _, _, reached in points for value in reached.values()]
    plot = Plot(x, Axis.around([*reaches, *(rate for rate, _ in roofs.values())], "GFLOP/s"), "Roofline")
    for rate, dtypes in roofs.values():
        knee = min(max(rate / limits["memory"], x.low), x.high)
        plot.line([(knee, rate), (x.high, rate)], "roof")
        plot.text(WIDTH - RIGHT - 4, plot.up(rate) - 6, f"{', '.join(dtypes)} peak {rate:.0f}", "note", "end")
    highest = max(rate for rate, _ in roofs.values())
    for bandwidth, kind in ((limits["memory"], "roof"), (limits["cache"], "roof faint")):
        start, end = max(x.low, plot.y.low / bandwidth), min(x.high, highest / bandwidth)
        if start < end:
            plot.line([(start, start * bandwidth), (end, end * bandwidth)], kind)
    for row, at, reached in points:
        for name in (PEER, OURS):
            if name in reached:
                plot.dot(at, reached[name], _kind(name), f"{row['name']}, {name}: {reached[name]:.4g} GFLOP/s")
    return plot.svg()


def _roofs(rows: Sequence[dict[str, Any]], limits: dict[str, Any]) -> dict[int, tuple[float, list[str]]]:
    """The peaks of the dtypes that occur, in GFLOP/s; one roof for those that share it."""
    roofs: dict[int, tuple[float, list[str]]] = {}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        rate = limits["operations"].get(dtype, limits["operations"]["float32"]) / 1e9
        roofs.setdefault(round(rate), (rate, []))[1].append(SHORT.get(dtype, dtype))
    return roofs


def memory_rates(limits: dict[str, Any]) -> dict[str, Any]:
    """``limits`` with the copy rates of memory and of the nearest cache, in GB/s."""
    sizes = sorted(map(int, limits["copy"]))
    ends = {"memory": sizes[-1], "cache": sizes[0]}
    return {**limits, **{name: copy_rate(limits["copy"], size) / 1e9 for name, size in ends.items()}}


def ratios(rows: Sequence[dict[str, Any]], limits: dict[str, Any]) -> str | None:
    """The ratio to torch of each row over its operations; None without rows."""
    points = []
    for row in rows:
        peer = figures(row, limits).peer
        if peer is not None and peer.ratio is not None and row["operations"]:
            points.append((row, peer.ratio))
    if not points:
        return None
    ends = [end for _, ratio in points for end in (ratio.low, ratio.high)]
    x = Axis.around((row["operations"] for row, _ in points), "operations of the row")
    plot = Plot(x, Axis.around([*ends, 0.8, 1.25], "torch / ours"), "Ratio to torch by size")
    plot.line([(plot.x.low, 1.0), (plot.x.high, 1.0)], "even")
    for row, ratio in points:
        at, kind = row["operations"], "better" if ratio.low > 1 else "worse" if ratio.high < 1 else "unsure"
        plot.line([(at, ratio.low), (at, ratio.high)], f"whisker {kind}")
        plot.dot(at, ratio.value, kind, f"{row['name']}: {ratio.value:.3g}x ±{ratio.noise:.0%}")
    return plot.svg()


def scaling(fits: Sequence[Fit], over: str) -> str | None:
    """Time of each kind of layer over ``n`` or ``d``; None without rows."""
    curves = [(fit, [(size, s * 1e3) for size, s in (fit.over_n if over == "n" else fit.over_d)]) for fit in fits]
    curves = [(fit, points) for fit, points in curves if len(points) > 1]
    if not curves:
        return None
    every = [point for _, points in curves for point in points]
    low, high = min(x for x, _ in every), max(x for x, _ in every)
    room = (high / low) ** 0.5  # for the labels at the curves' ends
    axis = Axis(low / 1.15, high * room, {"n": "length n", "d": "width d"}[over])
    plot = Plot(axis, Axis.around((y for _, y in every), "milliseconds"), f"Time over {over}")
    taken: list[float] = []
    for fit, points in sorted(curves, key=lambda curve: -curve[1][-1][1]):
        kind = f"form{FORMS.index(fit.form)}"
        dashed = "" if fit.provider == OURS else " dashed"
        plot.line(points, f"curve {kind}{dashed}")
        slope = fit.exponents[0 if over == "n" else 1]
        label = fit.form.name + (", torch" if fit.provider == PEER else "")
        if slope is not None:
            label += f" {over}^{slope:.1f}"
        at = plot.up(points[-1][1]) + 4
        while any(abs(at - other) < 13 for other in taken):
            at += 2
        taken.append(at)
        plot.text(plot.across(points[-1][0]) + 7, at, label, f"note {kind}")
        for size, milliseconds in points:
            plot.dot(size, milliseconds, f"mark {kind}", f"{label}, {over}={size}: {milliseconds:.4g} ms")
    return plot.svg()


def spread(row: dict[str, Any]) -> str:
    """A row's medians as bars from 0, ours above; the line through an end spans the middle 90% of the samples."""
    found = [(name, sorted(wall)) for name, wall in walls(row).items()]
    found.sort(key=lambda pair: (pair[0] != OURS, pair[0] != PEER))
    if not found:
        return ""
    most = max(_quantile(wall, 0.95) for _, wall in found)
    parts = []
    for index, (name, wall) in enumerate(found):
        y = 2 + 9 * index
        low, middle, high = (round(_quantile(wall, q) / most * 138, 1) for q in (0.05, 0.5, 0.95))
        told = f"<title>{escape(name)}</title>"
        parts.append(f'<rect class="{_kind(name)}" x="0" y="{y}" width="{middle}" height="6">{told}</rect>')
        parts.append(f'<line class="range" x1="{low}" x2="{high}" y1="{y + 3}" y2="{y + 3}"/>')
    height = 9 * len(found) + 2
    size = f'viewBox="0 0 140 {height}" height="{height}" preserveAspectRatio="none"'
    return f'<svg class="spread" {size} aria-hidden="true">{"".join(parts)}</svg>'


def _quantile(values: Sequence[float], share: float) -> float:
    return values[round(share * (len(values) - 1))]


def _kind(name: str) -> str:
    return {OURS: "ours", PEER: "torch"}.get(name, "peer")
