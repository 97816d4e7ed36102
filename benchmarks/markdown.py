"""The README's table from a saved run: generated, never typed."""

from __future__ import annotations

from typing import Any

from pytransformer.benchmarks._figures import figures, limits_line, milliseconds, raised_peaks

HEADER = ("op", "case", "torch, ms", "ours, ms", "speedup", "of the limit")


def markdown(results: dict[str, Any]) -> str:
    """A table of every row that has a time, and under it the machine it was measured on."""
    limits = raised_peaks(results)
    lines = [f"| {' | '.join(HEADER)} |", "|---|---|--:|--:|--:|--:|"]
    for row in results["rows"]:
        numbers = figures(row, limits)
        if numbers.ours is None:
            continue
        speedup = "-"
        if numbers.speedup is not None:
            speedup = f"{numbers.speedup.value:.2f}x ±{numbers.speedup.noise:.0%}"
        cells = (
            row["op"],
            f"{row['direction']} {row['dtype']} {row['shape']}",
            milliseconds(numbers.peer),
            milliseconds(numbers.ours),
            speedup,
            "-" if numbers.limit is None else f"{numbers.limit:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    described = results["environment"]
    machine = f"{described['cpu']}, {described['threads']} threads, {described['isa']}"
    commit = f", commit {described['commit'][:10]}" if described["commit"] else ""
    torch_version = described["versions"]["torch"]
    lines += ["", f"Measured on {machine}; torch {torch_version}{commit}; {limits_line(results)}."]
    return "\n".join(lines)
