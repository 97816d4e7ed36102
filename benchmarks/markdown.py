"""The README's table from a saved run: generated, never typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytransformer.benchmarks._figures import Figures, figures, limits_line, promises, quantity, raised_peaks

HEADER = ("op", "case", "torch, ms", "ours, ms", "speedup", "of the limit")
PROMISED = ("promised", "measured")
BEGIN, END = "<!-- table:begin (pytransformer bench markdown) -->", "<!-- table:end -->"


def markdown(results: dict[str, Any]) -> str:
    """A table of every row that was measured, and under it the machine; with what was promised, where anything was."""
    limits, threads = raised_peaks(results), results["environment"]["threads"]
    promised = results["suite"] in ("cpu", "gpu")
    header = HEADER + PROMISED if promised else HEADER
    lines = [f"| {' | '.join(header)} |", "|---|---|--:|--:|--:|--:|" + "---|---|" * promised]
    for row in results["rows"]:
        numbers = figures(row, limits, threads)
        if numbers.ours is None:
            continue
        peer = numbers.peer
        speedup = "-"
        if peer is not None and peer.ratio is not None:
            speedup = f"{peer.ratio.value:.2f}x ±{peer.ratio.noise:.0%}"
        cells = (
            row["op"],
            f"{row['direction']} {row['dtype']} {row['shape']}",
            "-" if peer is None else quantity(peer.median, row["metric"]),
            quantity(numbers.ours, row["metric"]),
            speedup,
            "-" if numbers.limit is None else f"{numbers.limit.value:.0%}",
        )
        if promised:
            cells += (promises(row), _against(row, numbers))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _where(results)])


def _against(row: dict[str, Any], numbers: Figures) -> str:
    """The figure beside each promise, and the verdict on all of them."""
    if not promises(row):
        return ""
    found = [f"{other.ratio.value:.2f}x {name}" for name, other in numbers.others.items()
             if name in row["targets"] and other.ratio is not None]  # fmt: skip
    if row["limit_target"] and numbers.limit is not None:
        found.append(f"{numbers.limit.value:.0%}")
    if numbers.rate is not None:
        found.append(f"{numbers.rate.value / 1e9:.3g} GB/s a thread")
    if numbers.speed is not None:
        found.append(f"{numbers.speed.value / 1e12:.3g} TFLOP/s")
    return f"{', '.join(found)}: {numbers.verdict}" if found else numbers.verdict


def _where(results: dict[str, Any]) -> str:
    described = results["environment"]
    machine = f"{described['cpu']}, {described['threads']} threads, {described['isa']}"
    if results["suite"] == "gpu":
        machine = described["gpu"]
    commit = f", commit {described['commit'][:10]}" if described["commit"] else ""
    text = f"Measured on {machine}; torch {described['versions']['torch']}{commit}; {limits_line(results)}."
    if "avx512f" in described["cpu_features"] and "avx512_bf16" not in described["cpu_features"]:
        text += " This processor has no AVX512-BF16: bfloat16 is widened to float32."
    return f"{text} Losses are shown like wins."


def write_into(path: Path, table: str) -> None:
    """Puts the table between the two marks of ``path``.

    Raises:
        ValueError: the file cannot be read, or does not have both marks.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"bench: cannot read {path}: {error}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"bench: {path} must have the lines {BEGIN!r} and {END!r}, between which the table goes")
    path.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")
