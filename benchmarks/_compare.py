"""Two runs side by side: a verdict for each row they share."""

from __future__ import annotations

from typing import Any

from pytransformer.benchmarks._case import OURS, PEER
from pytransformer.benchmarks._timing import change, change_verdict


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, float, float, str]]:
    """``(name, change of our time, its noise, verdict)`` for each row that both runs timed."""
    old = {row["name"]: row for row in before["rows"]}
    found = []
    for row in after["rows"]:
        other = old.get(row["name"])
        if other is None or OURS not in row["samples"] or OURS not in other["samples"]:
            continue
        ratio = change(_walls(other), _walls(row), OURS, PEER)
        found.append((row["name"], ratio.value - 1, ratio.noise, change_verdict(ratio)))
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What else differs between the runs, a line each."""
    a, b = before["environment"], after["environment"]
    keys = [key for key in a if key not in ("started", "load", "versions", "cpu_features") and a[key] != b.get(key)]
    lines = [f"{key}: {a[key]} -> {b.get(key)}" for key in keys]
    versions = {**a["versions"], **b["versions"]}
    changed = [name for name in versions if a["versions"].get(name) != b["versions"].get(name)]
    return lines + [f"{name}: {a['versions'].get(name)} -> {b['versions'].get(name)}" for name in changed]


def print_comparison(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Prints both, aligned."""
    rows = compare(before, after)
    width = max((len(name) for name, *_ in rows), default=0)
    for line in differences(before, after):
        print(f"differs: {line}")
    for name, delta, noise, verdict in rows:
        print(f"{name.ljust(width)}  {delta:+7.1%} ±{noise:.1%}  {verdict}")
    print("change of our time, in units of torch's time in the same run where torch was timed")


def _walls(row: dict[str, Any]) -> dict[str, list[float]]:
    return {name: samples["wall"] for name, samples in row["samples"].items()}
