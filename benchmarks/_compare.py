"""Two runs side by side: a verdict for each row they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pytransformer.benchmarks._case import BYTES, OURS, PEER
from pytransformer.benchmarks._figures import rounds
from pytransformer.benchmarks._statistics import TOLERANCE, Ratio, change, change_verdict, drift, rarest

UNTOLD = ("started", "load", "versions", "cpu_features", "megahertz")


@dataclass(frozen=True)
class Change:
    """One row of both runs: our time (or instructions) after over before, and what may be said of it."""

    name: str
    ratio: Ratio
    verdict: str
    of: str = "time"


def compare(before: dict[str, Any], after: dict[str, Any], tolerance: float = TOLERANCE) -> list[Change]:
    """The rows that both runs have a time (or a size) of ours for."""
    pairs, moved = _shared(before, after), drift_of(before, after)
    ratios = [change(rounds(other), rounds(row), OURS, PEER, moved) for other, row in pairs]
    chance = rarest([ratio.chance for ratio in ratios])
    found = []
    for (other, row), ratio in zip(pairs, ratios, strict=True):
        verdict, counted = change_verdict(ratio, tolerance, chance), _counted(other, row)
        if verdict == "cannot tell" and counted is not None:
            found.append(Change(row["name"], counted, change_verdict(counted, tolerance), "instructions"))
        else:
            found.append(Change(row["name"], ratio, verdict))
    return found


def drift_of(before: dict[str, Any], after: dict[str, Any]) -> float:
    """How far the same code drifts between visits, in both runs together; see ``_statistics``."""
    return drift([rounds(row) for pair in _shared(before, after) for row in pair if row["metric"] != BYTES], OURS, PEER)


def _shared(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The rows that both runs have samples of ours for, as pairs."""
    old = {row["name"]: row for row in before["rows"] if OURS in row["samples"]}
    return [(old[row["name"]], row) for row in after["rows"] if OURS in row["samples"] and row["name"] in old]


def _counted(before: dict[str, Any], after: dict[str, Any]) -> Ratio | None:
    """Our instructions after over before, where both runs counted them for one instruction set."""
    old, new = before.get("instructions"), after.get("instructions")
    if old is None or new is None or old["isa"] != new["isa"]:
        return None
    value = new["calls"][OURS] / old["calls"][OURS]
    return Ratio(value, value, value)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What else differs between the runs, a line each."""
    a, b = before["environment"], after["environment"]
    lines = [f"{key}: {a[key]} -> {b.get(key)}" for key in a if key not in UNTOLD and a[key] != b.get(key)]
    versions = {**a["versions"], **b["versions"]}
    changed = [name for name in versions if a["versions"].get(name) != b["versions"].get(name)]
    return lines + [f"{name}: {a['versions'].get(name)} -> {b['versions'].get(name)}" for name in changed]


def print_comparison(before: dict[str, Any], after: dict[str, Any], tolerance: float = TOLERANCE) -> int:
    """Prints both, aligned; returns how many rows are slower.

    Raises:
        ValueError: the runs share no row.
    """
    rows = compare(before, after, tolerance)
    if not rows:
        raise ValueError("bench: the two runs have no row in common")
    for line in differences(before, after):
        print(f"differs: {line}")
    width = max(len(row.name) for row in rows)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.verdict] = counts.get(row.verdict, 0) + 1
        print(
            f"{row.name.ljust(width)}  {row.ratio.value - 1:+7.1%} ±{row.ratio.noise:.1%}  {row.verdict}"
            f"{'' if row.of == 'time' else ', by ' + row.of}"
        )
    print(f"{len(rows)} rows: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    moved = drift_of(before, after)
    print(
        f"change of our time, in units of torch's in the same rounds where torch was timed; drift ±{moved:.1%} a visit"
    )
    return counts.get("slower", 0)
