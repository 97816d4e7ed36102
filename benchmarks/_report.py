"""``bench report``: one HTML file that holds everything, readable on a phone, in the dark and on paper.

Every figure is the one that the terminal shows (``_figures``), in full precision in ``data-value``. The page
loads nothing; its script only sorts tables and switches between light and dark.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pytransformer.benchmarks import _plots, complexity
from pytransformer.benchmarks._case import BYTES
from pytransformer.benchmarks._figures import Figures, Versus, figures, limits_line, notes, quantity, raised_peaks

TEMPLATE = Path(__file__).with_name("report.html")
KINDS = {"met": "good", "faster": "good", "missed": "bad", "slower": "bad", "WRONG": "bad"}
ORDER = ("met", "faster", "cannot tell", "missed", "slower", "WRONG")


def write_report(results: dict[str, Any], path: Path) -> None:
    """Writes the page.

    Raises:
        ValueError: jinja2 is missing, or the results have no row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(results), encoding="utf-8")


def html(results: dict[str, Any]) -> str:
    """The page as text; raises as ``write_report`` does."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ValueError("bench: a report needs jinja2, which torch brings: pip install jinja2") from error
    if not results["rows"]:
        raise ValueError("bench: there is no row to report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**context(results))


def context(results: dict[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    limits, threads = raised_peaks(results), results["environment"]["threads"]
    groups: dict[str, list[dict[str, Any]]] = {}
    counts: Counter[str] = Counter()
    for row in results["rows"]:
        numbers = figures(row, limits, threads)
        counts[numbers.verdict or "no peer"] += 1
        name = row["op"] + (": peak memory" if row["metric"] == BYTES else "")
        groups.setdefault(name, []).append(_shown(row, numbers))
    fits = complexity.fits(results)
    return {
        "suite": results["suite"],
        "finished": results["finished"],
        "counts": sorted(counts.items(), key=lambda pair: ORDER.index(pair[0]) if pair[0] in ORDER else len(ORDER)),
        "kinds": KINDS,
        "total": len(results["rows"]),
        "machine": _machine(results),
        "limits": limits_line(results),
        "plots": _drawn(results, limits, fits),
        "fits": [{"form": fit.form, "provider": fit.provider, "exponents": fit.exponents} for fit in fits],
        "groups": groups,
        "peers": results["peers"],
        "notes": notes(results),
    }


def _drawn(results: dict[str, Any], limits: dict[str, Any], fits: list[complexity.Fit]) -> list[dict[str, str]]:
    """The plots that these results have something for."""
    told = {
        "Roofline": "Filled: ours; hollow: torch. Lines: the measured peaks, and copies from memory and (faint) cache.",
        "Ratio to torch, by size": "Above the line ours is faster; the whisker is the 95% interval.",
        "Time over length": f"One layer of each kind, d = {complexity.FIXED_WIDTH}. Dashed: torch. The exponent is "
        "fitted to the largest sizes.",
        "Time over width": f"The same over d, n = {complexity.FIXED_LENGTH}.",
    }
    drawn = (
        _plots.roofline(results["rows"], _plots.memory_rates(limits)),
        _plots.ratios([row for row in results["rows"] if row["metric"] != BYTES], limits),
        _plots.scaling(fits, "n"),
        _plots.scaling(fits, "d"),
    )
    titled = zip(told.items(), drawn, strict=True)
    return [{"title": title, "svg": svg, "told": text} for (title, text), svg in titled if svg]


def _shown(row: dict[str, Any], numbers: Figures) -> dict[str, Any]:
    """A row of a table: text to read and values to sort by."""
    dtype = _plots.SHORT.get(row["dtype"], row["dtype"])
    peer = numbers.peer
    return {
        "name": row["name"],
        "shape": row["shape"],
        "how": f"{row['direction']} {dtype}",
        "sizes": ", ".join(f"{name}={value}" for name, value in row["sizes"].items()),
        "ours": _value(numbers.ours, row["metric"]),
        "torch": _value(peer.median if peer else None, row["metric"]),
        "ratio": _ratio(peer),
        "limit": None if (limit := numbers.limit) is None else {"value": limit.value, "text": f"{limit.value:.0%}"},
        "target": _target(row),
        "verdict": numbers.verdict,
        "kind": KINDS.get(numbers.verdict, "even"),
        "spread": _plots.spread(row),
        "others": [
            {"name": name, "time": _value(other.median, row["metric"]), "ratio": _ratio(other)}
            for name, other in numbers.others.items()
            if other is not peer
        ],
    }


def _value(value: float | None, metric: str) -> dict[str, Any] | None:
    if value is None:
        return None
    text = quantity(value, metric)
    unit = "iB" if metric == BYTES else "s" if text.endswith("µ") else " ms"
    return {"value": value, "text": text, "unit": unit}


def _ratio(other: Versus | None) -> dict[str, Any] | None:
    if other is None or other.ratio is None:
        return None
    return {"value": other.ratio.value, "text": f"{other.ratio.value:.2f}x", "noise": f"±{other.ratio.noise:.0%}"}


def _target(row: dict[str, Any]) -> str:
    found = [f"{target:.3g}x {name}" for name, target in row["targets"].items()]
    if row["limit_target"]:
        found.append(f"{row['limit_target']:.0%} of the limit")
    if row["rate_target"]:
        found.append(f"{row['rate_target'] / 1e9:.0f} GB/s a thread")
    if row.get("speed_target"):
        found.append(f"{row['speed_target'] / 1e12:.0f} TFLOP/s")
    return ", ".join(found)


def _machine(results: dict[str, Any]) -> dict[str, str]:
    """The environment in words."""
    found = results["environment"]
    caches = "flushed before each sample" if results["settings"]["flush"] else "warm"
    commit = "" if not found["commit"] else found["commit"][:10] + (", with changes" if found["dirty"] else "")
    lines = {
        "processor": f"{found['cpu']}, {found['cores']} cores",
        "GPU": found.get("gpu") or "",
        "threads": str(found["threads"]),
        "instruction set": found["isa"] or "",
        "features": " ".join(found["cpu_features"]),
        "clock, MHz": ", ".join(f"{name} {value:.0f}" for name, value in found.get("megahertz", {}).items()),
        "caches": ", ".join([*(f"{k} {v}" for k, v in found.get("caches", {}).items()), caches]),
        **found["versions"],
        "commit": commit,
        "load before": "" if found["load"] is None else f"{found['load']:.2f}",
        "started": found["started"],
    }
    return {name: text for name, text in lines.items() if text}
