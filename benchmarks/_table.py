"""The table in the terminal: live while a suite runs, whole at its end. Fits in 80 columns."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pytransformer.benchmarks._case import Case
from pytransformer.benchmarks._figures import Figures, figures, limits_line, milliseconds, notes, raised_peaks

STYLES = {"met": "green", "faster": "green", "missed": "red", "slower": "red", "WRONG": "bold red"}
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def table(results: dict[str, Any], last: int | None = None) -> Table:
    """The rows, grouped by op; only the ``last`` so many where given."""
    found = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    found.add_column("milliseconds, speedup over torch", no_wrap=True, max_width=34)
    for title in ("ours", "torch", "speedup", "noise", "limit"):
        found.add_column(title, justify="right", no_wrap=True)
    found.add_column("target", no_wrap=True)
    limits = raised_peaks(results)
    rows = results["rows"] if last is None else results["rows"][-last:]
    op = None
    for row in rows:
        if row["op"] != op:
            op = row["op"]
            found.add_row(f"[bold]{op}[/]")
        found.add_row(*cells(row, figures(row, limits)))
    return found


def cells(row: dict[str, Any], numbers: Figures) -> tuple[str, ...]:
    """The row's seven cells, styled."""
    style = STYLES.get(numbers.verdict)
    verdict = f"[{style}]{numbers.verdict}[/]" if style else numbers.verdict
    target = "" if numbers.target is None else f"{numbers.target:g}x "
    label = f" {row['direction']} {DTYPES.get(row['dtype'], row['dtype'])} {row['shape']}"
    speedup = numbers.speedup
    return (
        label.replace("[", r"\["),
        milliseconds(numbers.ours),
        milliseconds(numbers.peer),
        "-" if speedup is None else f"{speedup.value:.2f}x",
        "-" if speedup is None else f"±{speedup.noise:.0%}",
        "-" if numbers.limit is None else f"{numbers.limit:.0%}",
        target + verdict,
    )


def print_results(results: dict[str, Any], console: Console | None = None) -> None:
    """The whole table, what it is measured against, and everything that is not in it."""
    out = console or Console()
    out.print(table(results))
    described = results["environment"]
    versions = described["versions"]
    out.print(f"{described['cpu']}, {described['isa']}, {described['threads']} threads, torch {versions['torch']}")
    out.print(limits_line(results), markup=False, highlight=False)
    out.print("limit: the row's floor, by operations or bytes, as a fraction of our time", highlight=False)
    for line in notes(results):
        out.print(line, markup=False, highlight=False)


class LiveTable:
    """Shows the rows as they come, with progress and time left; plain lines where there is no terminal."""

    def __init__(self, cases: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("measuring the machine", total=cases)
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
        self.progress.update(self.task, description=f"{case.op} {case.direction} {case.shape}"[:44])

    def finished(self, results: dict[str, Any], index: int) -> None:
        self.progress.update(self.task, completed=index + 1)
        if self.console.is_terminal:
            self.live.update(Group(table(results, last=max(self.console.height - 8, 4)), self.progress))
            return
        row = results["rows"][-1]
        numbers = figures(row, raised_peaks(results))
        speedup = "-" if numbers.speedup is None else f"{numbers.speedup.value:.2f}x"
        self.console.print(f"{row['name']}: {speedup} {numbers.verdict}", markup=False, highlight=False)
