"""What a row of samples says: ratios, noise, fraction of the machine's limit, verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytransformer.benchmarks._case import BYTES, LIMIT, OURS, PEER
from pytransformer.benchmarks._peaks import floors
from pytransformer.benchmarks._statistics import (
    MOST_NOISE,
    Ratio,
    Rounds,
    change,
    drift,
    median,
    over_median,
    paired_ratio,
    target_verdict,
    worst_verdict,
)
from pytransformer.benchmarks._timing import LEAST_ROUNDS


@dataclass(frozen=True)
class Versus:
    """Ours beside one other provider; above 1, ours is better."""

    median: float
    ratio: Ratio | None
    target: float | None
    verdict: str


@dataclass(frozen=True)
class Figures:
    """A row in numbers; None where there is nothing to tell them from.

    Attributes:
        ours: our median, in seconds or bytes.
        others: the other providers by name.
        limit: the row's floor over our time; the floor as timed beside it, where the row promises a fraction of it.
        rate: bytes a second and thread, where the row has a target for it.
        speed: operations a second, likewise.
        verdict: of the row as a whole.
    """

    ours: float | None
    others: dict[str, Versus]
    limit: Ratio | None
    rate: Ratio | None
    speed: Ratio | None
    verdict: str

    @property
    def peer(self) -> Versus | None:
        """torch."""
        return self.others.get(PEER)


def walls(row: dict[str, Any]) -> Mapping[str, Sequence[float]]:
    """The samples by provider; without those of busy rounds, where enough others are left."""
    return {name: wall for name, wall in rounds(row).walls.items() if name != LIMIT}


def rounds(row: dict[str, Any]) -> Rounds:
    """The same with the visit of each round."""
    found = {name: samples["wall"] for name, samples in row["samples"].items()}
    busy, visits = row.get("busy") or [], row.get("visits") or []
    if not any(busy) or busy.count(False) < LEAST_ROUNDS:
        return Rounds(found, visits)
    quiet = [index for index, flag in enumerate(busy) if not flag]
    return Rounds(
        {name: [wall[i] for i in quiet] for name, wall in found.items()}, [visits[i] for i in quiet] if visits else []
    )


def figures(row: dict[str, Any], limits: dict[str, Any], threads: int = 1) -> Figures:
    """The figures of a row; ``limits`` as ``raised_peaks`` gives them."""
    samples = dict(rounds(row).walls)
    beside = samples.pop(LIMIT, None)
    if OURS not in samples:
        others = {name: Versus(median(wall), None, None, "") for name, wall in samples.items()}
        return Figures(None, others, None, None, None, _without_ours(row))
    ours = samples.pop(OURS)
    others = {}
    for name, wall in samples.items():
        ratio, target = paired_ratio(wall, ours), row["targets"].get(name)
        others[name] = Versus(median(wall), ratio, target, target_verdict(ratio, target))
    limit = rate = speed = None
    if row["metric"] != BYTES:
        limit = over_median(floor_seconds(row, limits), ours) if beside is None else paired_ratio(beside, ours)
        rate = over_median(row["bytes"] / threads, ours) if row["rate_target"] else None
        speed = over_median(row["operations"], ours) if row.get("speed_target") else None
    found = (limit, row["limit_target"]), (rate, row["rate_target"]), (speed, row.get("speed_target"))
    return Figures(median(ours), others, limit, rate, speed, _verdict(row, others, found))


def _verdict(row: dict[str, Any], others: dict[str, Versus], judged: Sequence[tuple[Ratio | None, Any]]) -> str:
    """Of all targets together; without any, of torch."""
    verdicts = [other.verdict for other in others.values() if other.target is not None]
    for found, target in judged:
        if found is not None and target:
            verdicts.append(target_verdict(found, target))
    if verdicts:
        return worst_verdict(verdicts)
    if row["targets"]:
        return "peer absent"
    if PEER in others:
        return others[PEER].verdict
    return "torch is wrong" if PEER in row["wrong"] else ""


def promises(row: Mapping[str, Any]) -> str:
    """What a row, or a case's fields, asks for, in words."""
    found = [f"{target:g}x {name}" for name, target in row["targets"].items()]
    if row["limit_target"]:
        found.append(f"{row['limit_target']:.0%} of the limit")
    if row["rate_target"]:
        found.append(f"{row['rate_target'] / 1e9:g} GB/s a thread")
    if row.get("speed_target"):
        found.append(f"{row['speed_target'] / 1e12:g} TFLOP/s")
    return ", ".join(found)


def _without_ours(row: dict[str, Any]) -> str:
    if OURS in row["wrong"]:
        return "WRONG"
    return "absent" if row["absent"].keys() & {"case", OURS} else ""


def floor_seconds(row: dict[str, Any], limits: dict[str, Any]) -> float:
    """No kernel is faster: operations over the peak rate or bytes over the copy rate, whichever is longer."""
    return max(floors(row["dtype"], row["operations"], row["bytes"], limits))


def raised_peaks(results: dict[str, Any]) -> dict[str, Any]:
    """The measured peaks, raised where a row of this library goes beyond them; names the source."""
    limits: dict[str, Any] = {**results["peaks"], "operations": dict(results["peaks"]["operations"])}
    limits["sources"] = dict(limits["sources"])
    for row in results["rows"]:
        if OURS not in row["samples"] or row["metric"] == BYTES:
            continue
        rate = row["operations"] / median(walls(row)[OURS])
        if rate > limits["operations"].get(row["dtype"], 0.0):
            limits["operations"][row["dtype"]] = rate
            limits["sources"][row["dtype"]] = f"reached by {row['name']}"
    return limits


def too_noisy(results: dict[str, Any]) -> list[str]:
    """The names of the rows whose times would allow no verdict on this run and another one like it."""
    timed = [row for row in results["rows"] if OURS in row["samples"] and row["metric"] != BYTES]
    found = [(row["name"], rounds(row)) for row in timed if row["device"] == "cpu"]
    moved = drift([row for _, row in found], OURS, PEER)
    return [name for name, row in found if change(row, row, OURS, PEER, moved).noise > MOST_NOISE]


def notes(results: dict[str, Any]) -> list[str]:
    """Everything that was wrong, absent or served by no kernel of ours, a line each; the same said once."""
    counted: Counter[str] = Counter()
    for row in results["rows"]:
        for who, why in row["wrong"].items():
            counted[f"WRONG {row['name']}, {who}: {why}"] += 1
        for who, why in row["absent"].items():
            counted[f"absent: {row['name']}: {why}" if who == "case" else f"absent: {row['op']}, {who}: {why}"] += 1
        for reason in row["unfused"]:
            counted[f"not by a kernel: {reason}"] += 1
        if "instructions" in row:
            calls = ", ".join(f"{who} {number:.4g}" for who, number in row["instructions"]["calls"].items())
            counted[f"instructions of a call ({row['instructions']['isa']}, 1 thread): {row['name']}: {calls}"] += 1
        if walls(row) and any(row["busy"]) and row["busy"].count(False) < LEAST_ROUNDS:
            counted["timed while the machine was busy; run again when it is not"] += 1
    return [line if count == 1 else f"{line} ({count} rows)" for line, count in counted.items()]


def quantity(value: float | None, metric: str) -> str:
    """Milliseconds, or mebibytes with their letter; three significant digits in five characters."""
    if value is None:
        return "-"
    if metric == BYTES:
        return f"{_three(value / 2**20)}M"
    return _three(value * 1e3) if value >= 1e-4 else f"{_three(value * 1e6)}\u00b5"


def _three(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def limits_line(results: dict[str, Any]) -> str:
    """The peaks in words."""
    limits = raised_peaks(results)
    rates = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s {dtype} ({limits['sources'][dtype]})" for dtype, rate in limits["operations"].items()
    )
    sizes = sorted(limits["copy"], key=int)
    copies = ", ".join(f"{limits['copy'][s] / 1e9:.1f} GB/s at {int(s) // 2**20} MiB" for s in (sizes[0], sizes[-1]))
    return f"limits: {rates}; copy {copies}"
