"""The loop over the cases: build, check, time, save. A killed run leaves a valid file of what it had done."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from pytransformer._tolerance import Comparison
from pytransformer.benchmarks._case import OURS, AbsentError, Case
from pytransformer.benchmarks._environment import environment, peaks
from pytransformer.benchmarks._timing import measure

SCHEMA = 1
SECONDS, QUICK_SECONDS = 1.5, 0.3  # of timing, for each case
PEER_SLACK = 4.0  # a peer a little less exact than eager torch is not wrong; ours is held to the rule itself

Results = dict[str, Any]
Listener = Callable[[Results, int], None]


def run(
    cases: Sequence[Case],
    output: Path,
    suite: str,
    threads: int | None = None,
    quick: bool = False,
    starting: Callable[[Case], None] = lambda case: None,
    finished: Listener = lambda results, index: None,
) -> Results:
    """Runs the cases in order and writes ``output`` after each; returns what it holds.

    Args:
        cases: what to run.
        output: the JSON file.
        suite: its name, for the record.
        threads: of torch and the CPU kernels; torch's own choice without.
        quick: a fifth of the time.
        starting: called before a case.
        finished: called after it, with all results so far and the case's index.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    results: Results = {
        "schema": SCHEMA,
        "suite": suite,
        "quick": quick,
        "environment": environment(),
        "peaks": peaks(quick),
        "rows": [],
        "finished": False,
    }
    save(results, output)
    for index, case in enumerate(cases):
        starting(case)
        results["rows"].append(run_case(case, QUICK_SECONDS if quick else SECONDS, seed=index))
        save(results, output)
        finished(results, index)
    results["finished"] = True
    save(results, output)
    return results


def run_case(case: Case, seconds: float, seed: int = 0) -> dict[str, Any]:
    """One case as a row of JSON. A provider that is wrong against float64 gets no time."""
    row: dict[str, Any] = {
        "name": case.name,
        "op": case.op,
        "direction": case.direction,
        "dtype": case.dtype,
        "shape": case.shape,
        "operations": case.operations,
        "bytes": case.bytes,
        "target": case.target,
        "samples": {},
        "wrong": {},
        "absent": {},
    }
    try:
        problem = case.build()
    except AbsentError as reason:
        row["absent"] = {"case": str(reason)}
        return row
    row["absent"] = dict(problem.absent)
    if problem.operations is not None:
        row["operations"], row["bytes"] = problem.operations, problem.bytes
    right = {}
    for name, provider in problem.providers.items():
        reason = _gate(provider, problem.check, 1.0 if name == OURS else PEER_SLACK)
        if reason is None:
            right[name] = provider
        else:
            row["wrong"][name] = reason
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    for name, samples in measure(right, seconds, seed).items() if right else ():
        row["samples"][name] = {"calls": samples.calls, "wall": samples.wall, "cpu": samples.cpu}
    row["load"] = load
    del problem, right
    gc.collect()
    return row


def _gate(provider: Callable[[], Any], check: Callable[[Any], list[Comparison]], slack: float) -> str | None:
    """Why the provider gets no time, or None. ``slack`` is how many times what is allowed it may be off."""
    try:
        wrong = [str(found) for found in check(provider()) if found.ratio > slack]
    except Exception as error:  # a provider that raises is wrong; the other rows go on
        return f"{type(error).__name__}: {error}"
    return "; ".join(wrong) or None


def save(results: Results, path: Path) -> None:
    """Writes ``path`` in one step: a reader finds the file before or after, never a half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, path)


def load(path: Path) -> Results:
    """A file that ``save`` wrote.

    Raises:
        ValueError: it is not one, or of a schema this version does not read.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"bench: cannot read {path}: {error}") from error
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"bench: {path} is not a benchmark result of schema {SCHEMA}")
    return results


def chosen(cases: Iterable[Case], text: str) -> list[Case]:
    """The cases whose name contains ``text``."""
    return [case for case in cases if text in case.name]
