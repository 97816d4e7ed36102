"""The table in the terminal: live while a suite runs, whole at its end. Fits in 80 columns."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pytransformer.benchmarks._case import BYTES, PEER, Case
from pytransformer.benchmarks._figures import Figures, Versus, figures, limits_line, notes, quantity, raised_peaks
from pytransformer.benchmarks._statistics import Ratio

STYLES = {"met": "green", "faster": "green", "missed": "red", "slower": "red", "WRONG": "bold red"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
TITLES = ("ours", PEER, "ratio", "peak")


def table(results: dict[str, Any], shown: slice = slice(None)) -> Table:
    """The rows, or those that are ``shown``, grouped by op, direction and dtype."""
    found = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    found.add_column("milliseconds", no_wrap=True, max_width=33)
    for title in TITLES:
        found.add_column(title, justify="right", no_wrap=True)
    found.add_column("target", no_wrap=True)
    limits, threads = raised_peaks(results), results["environment"]["threads"]
    group = None
    for row in results["rows"][shown]:
        kind = "memory" if row["metric"] == BYTES else row["direction"]
        heading = f"{row['op']} {kind} {DTYPES.get(row['dtype'], row['dtype'])}"
        if heading != group:
            group = heading
            found.add_row(f"[bold]{group}[/]")
        numbers = figures(row, limits, threads)
        found.add_row(*cells(row, numbers))
        for name, other in numbers.others.items():
            if name != PEER:
                found.add_row(*_peer_cells(row, name, other))
    return found


def cells(row: dict[str, Any], numbers: Figures) -> tuple[str, ...]:
    """The row's six cells, styled."""
    targets = [] if PEER not in row["targets"] else [f"{row['targets'][PEER]:g}x"]
    if row["limit_target"]:
        targets.append(f"{row['limit_target']:.0%}")
    if row["rate_target"]:
        targets.append(f"{row['rate_target'] / 1e9:.0f}GB/s")
    if row.get("speed_target"):
        targets.append(f"{row['speed_target'] / 1e12:.0f}TFLOP/s")
    peer = numbers.peer
    return (
        f" {escape(row['shape'])}",
        quantity(numbers.ours, row["metric"]),
        "-" if peer is None else quantity(peer.median, row["metric"]),
        ratio_text(peer.ratio if peer else None),
        "-" if numbers.limit is None else f"{numbers.limit.value:.0%}",
        " ".join([*targets, _styled(numbers.verdict)]),
    )


def _peer_cells(row: dict[str, Any], name: str, other: Versus) -> tuple[str, ...]:
    target = "" if other.target is None else f"{other.target:g}x "
    time = quantity(other.median, row["metric"])
    return f"   {name}", "", time, ratio_text(other.ratio), "", target + _styled(other.verdict)


def ratio_text(ratio: Ratio | None) -> str:
    """``1.32x ±2%``."""
    if ratio is None:
        return "-"
    noise = f"±{ratio.noise:.0%}" if ratio.noise < 1 else ">100%"
    return f"{ratio.value:.3g}x {noise}"


def _styled(verdict: str) -> str:
    style = STYLES.get(verdict)
    return f"[{style}]{verdict}[/]" if style else verdict


def summary(results: dict[str, Any]) -> str:
    """How many rows have which verdict."""
    limits, threads = raised_peaks(results), results["environment"]["threads"]
    counts: dict[str, int] = {}
    for row in results["rows"]:
        verdict = figures(row, limits, threads).verdict or "no peer"
        counts[verdict] = counts.get(verdict, 0) + 1
    return f"{len(results['rows'])} rows: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def print_results(results: dict[str, Any], console: Console | None = None) -> None:
    """The whole table, what it is measured against, and everything that is not in it."""
    out = console or Console()
    out.print(table(results))
    described, settings = results["environment"], results["settings"]
    device = described["gpu"] if results["suite"] == "gpu" else f"{described['cpu']}, {described['isa']}"
    caches = "flushed before each sample" if settings["flush"] else "warm"
    lines = [
        summary(results),
        f"{device}, {described['threads']} threads, torch {described['versions']['torch']}; caches {caches}",
        limits_line(results),
        "ratio: the other's median over ours, ± its 95% interval; peak: the row's floor, by operations or bytes, "
        "over our time; both timed in the same rounds where a fraction is promised",
        *(f"peer {name} {found.get('version') or 'absent: ' + found['absent']}"
          for name, found in results["peers"].items()),
        *notes(results),
    ]  # fmt: skip
    for line in lines:
        out.print(line, markup=False, highlight=False)


class LiveTable:
    """Shows the rows as they come, with progress and time left; plain lines where there is no terminal."""

    def __init__(self, visits: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("measuring the machine", total=visits)
        self.live = Live(self.progress, console=self.console, transient=True, refresh_per_second=4)

    def __enter__(self) -> LiveTable:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def starting(self, case: Case) -> None:
        self.progress.update(self.task, description=escape(f"{case.op} {case.direction} {case.shape}"[:34]))

    def finished(self, results: dict[str, Any], index: int) -> None:
        self.progress.advance(self.task)
        done = self.progress.tasks[self.task]
        self.progress.update(self.task, total=max(done.total or 0, done.completed))  # rows too noisy are visited again
        if self.console.is_terminal:
            fitting = max(self.console.height // 2 - 4, 3)
            self.live.update(Group(table(results, slice(max(index + 1 - fitting, 0), index + 1)), self.progress))
            return
        row = results["rows"][index]
        numbers = figures(row, raised_peaks(results), results["environment"]["threads"])
        ratio = ratio_text(numbers.peer.ratio if numbers.peer else None)
        self.console.print(f"{row['name']}: {ratio} {numbers.verdict}", markup=False, highlight=False)
