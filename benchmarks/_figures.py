"""What a row of samples says: speedup, noise, fraction of the machine's limit, verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pytransformer.benchmarks._case import OURS, PEER
from pytransformer.benchmarks._environment import copy_rate
from pytransformer.benchmarks._timing import Ratio, median, paired_ratio, target_verdict


@dataclass(frozen=True)
class Figures:
    """A row in numbers; None where there is no time."""

    ours: float | None
    peer: float | None
    speedup: Ratio | None
    limit: float | None
    target: float | None
    verdict: str


def figures(row: dict[str, Any], limits: dict[str, Any]) -> Figures:
    """The figures of a row; ``limits`` as ``raised_peaks`` gives them."""
    samples = {name: found["wall"] for name, found in row["samples"].items()}
    ours = median(samples[OURS]) if OURS in samples else None
    peer = median(samples[PEER]) if PEER in samples else None
    limit = None if ours is None else floor_seconds(row, limits) / ours
    if OURS in samples and PEER in samples:
        speedup = paired_ratio(samples[PEER], samples[OURS])
        return Figures(ours, peer, speedup, limit, row["target"], target_verdict(speedup, row["target"]))
    if OURS in row["wrong"]:
        verdict = "WRONG"
    elif "case" in row["absent"]:
        verdict = "absent"
    else:
        verdict = "torch is wrong" if PEER in row["wrong"] else "no peer"
    return Figures(ours, peer, None, limit, row["target"], verdict)


def floor_seconds(row: dict[str, Any], limits: dict[str, Any]) -> float:
    """No kernel is faster: operations over the peak rate or bytes over the copy rate, whichever is longer."""
    rates = limits["operations"]
    rate = rates.get(row["dtype"], rates["float32"])
    return float(max(row["operations"] / rate, row["bytes"] / copy_rate(limits["copy"], row["bytes"])))


def raised_peaks(results: dict[str, Any]) -> dict[str, Any]:
    """The measured peaks, raised where a row of this library goes beyond them; names the source."""
    limits: dict[str, Any] = dict(results["peaks"])
    limits["operations"] = dict(limits["operations"])
    limits["sources"] = dict.fromkeys(limits["operations"], limits["operations_source"])
    for row in results["rows"]:
        if OURS not in row["samples"]:
            continue
        rate = row["operations"] / median(row["samples"][OURS]["wall"])
        if rate > limits["operations"].get(row["dtype"], 0.0):
            limits["operations"][row["dtype"]] = rate
            limits["sources"][row["dtype"]] = f"reached by {row['name']}"
    return limits


def notes(results: dict[str, Any]) -> list[str]:
    """Everything that was wrong or absent, a line each."""
    lines = []
    for row in results["rows"]:
        lines += [f"WRONG {row['name']}, {who}: {why}" for who, why in row["wrong"].items()]
        for who, why in row["absent"].items():
            lines.append(f"absent: {row['name']}{'' if who == 'case' else ', ' + who}: {why}")
    return lines


def milliseconds(seconds: float | None) -> str:
    """Three significant digits."""
    return "-" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def limits_line(results: dict[str, Any]) -> str:
    """The peaks in words."""
    limits = raised_peaks(results)
    rates = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s {dtype} ({limits['sources'][dtype]})" for dtype, rate in limits["operations"].items()
    )
    sizes = sorted(limits["copy"], key=int)
    copies = ", ".join(f"{limits['copy'][s] / 1e9:.1f} GB/s at {int(s) // 2**20} MiB" for s in (sizes[0], sizes[-1]))
    return f"limits: {rates}; copy {copies}"
