"""The loop over the cases: build, check, time, save. A killed run leaves a valid file of what it had done.

The loop goes around three times. The first visit of a case checks its providers; the others make its tensors anew and
take as many samples again. By what they say, ``_statistics`` knows how far two runs of the same code differ; rows that
differ too far for a verdict are visited once more. Where peers take part, some of which compile a model for a minute,
and where memory is measured, one visit is all.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pytransformer._tolerance import Comparison
from pytransformer.backends import BackendError, Decision, record_decisions, unavailable, use_backend
from pytransformer.benchmarks import _device, _instructions, _processes, peers
from pytransformer.benchmarks._case import BYTES, LIMIT, OURS, PEER, AbsentError, Case, Problem
from pytransformer.benchmarks._environment import environment
from pytransformer.benchmarks._figures import too_noisy
from pytransformer.benchmarks._file import SCHEMA, Results, resumable, save
from pytransformer.benchmarks._peaks import Peaks, limit, peaks
from pytransformer.benchmarks._timing import Provider, flusher, measure

SECONDS, QUICK_SECONDS = 0.42, 0.1  # of timing, for all visits of a case
VISITS = 3  # of a case in a run, so that two runs can be compared
MOST_VISITS = 4  # of one that is still too noisy for that
PEER_SLACK = 4.0  # a peer a little less exact than eager torch is not wrong; ours is held to the rule itself

Starting = Callable[[Case], None]
Finished = Callable[[Results, int], None]


@dataclass(frozen=True)
class Settings:
    """How a run is timed: what a resumed run must share with the one it goes on with.

    Attributes:
        quick: one short visit.
        flush: the caches are emptied before each sample.
        peers: names of the peers that take part.
    """

    quick: bool = False
    flush: bool = False
    peers: tuple[str, ...] = ()

    def seconds(self, case: Case) -> float:
        """Of timing, for each visit."""
        return (QUICK_SECONDS if self.quick else SECONDS) / self.visits(case)

    def visits(self, case: Case) -> int:
        """How often a case is timed, unless it is too noisy then."""
        return 1 if self.quick or self.peers or case.metric == BYTES else VISITS


PLAIN = Settings()


def run(
    cases: Sequence[Case],
    output: Path,
    suite: str,
    settings: Settings = PLAIN,
    *,
    resume: bool = False,
    instructions: bool = False,
    starting: Starting = lambda case: None,
    finished: Finished = lambda results, index: None,
) -> Results:
    """Runs the cases in order and writes ``output`` after each; returns what it holds.

    Args:
        cases: what to run.
        output: the JSON file.
        suite: its name, for the record.
        settings: how.
        resume: keep the rows that ``output`` has, and run the others only.
        instructions: count them for the rows that are too noisy to time.
        starting: called before a case.
        finished: called after each visit, with all results so far and the row's index.

    Raises:
        ValueError: ``output`` is of another run, and cannot be resumed.
    """
    described, how = environment(), {**asdict(settings), "peers": list(settings.peers)}
    device = cases[0].device if cases else "cpu"
    if resume and output.exists():
        results = resumable(output, suite, described, how)
    else:
        results = {
            "schema": SCHEMA,
            "suite": suite,
            "settings": how,
            "environment": described,
            "peaks": peaks(device, settings.quick),
            "peers": peers.versions(settings.peers),
            "rows": [],
        }
    results["finished"] = False
    save(results, output)
    gc.freeze()  # what is there already is not looked through after every visit
    try:
        with peers.Peers(settings.peers) as joined, _device.stream_of_its_own(device):
            for visit in range(MOST_VISITS):
                for index, case in enumerate(_cases_of(visit, cases, results, settings)):
                    finished(results, _visit(results, case, visit, settings, joined, index, output, starting))
    finally:
        gc.unfreeze()
    if instructions:
        _count_noisy(results, cases, output, starting)
    results["finished"] = True
    save(results, output)
    return results


def _cases_of(visit: int, cases: Sequence[Case], results: Results, settings: Settings) -> list[Case]:
    """Whose turn it is: at the last visit those that are visited more than once and are still too noisy."""
    if visit < VISITS:
        return [case for case in cases if visit < settings.visits(case)]
    again = [case for case in cases if settings.visits(case) > 1]
    noisy = too_noisy(results) if again else []
    return [case for case in again if case.name in noisy]


def _visit(
    results: Results, case: Case, visit: int, settings: Settings, joined: peers.Peers, seed: int, output: Path,
    starting: Starting,
) -> int:  # fmt: skip
    """One visit of a case, unless ``results`` has it already; the index of its row."""
    rows = results["rows"]
    index = next((index for index, row in enumerate(rows) if row["name"] == case.name), len(rows))
    if index == len(rows):
        starting(case)
        rows.append(run_case(case, settings, joined, seed, results["peaks"]))
    elif rows[index]["samples"] and rows[index]["visits"][-1] < visit:
        starting(case)
        time_again(rows[index], case, settings, visit, seed, results["peaks"])
    else:
        return index
    save(results, output)
    return index


def _count_noisy(results: Results, cases: Sequence[Case], output: Path, starting: Starting) -> None:
    """Counts instructions for the rows whose noise allows no verdict on two runs."""
    noisy, by_name = too_noisy(results), {case.name: case for case in cases}
    for row in results["rows"]:
        if row["name"] in noisy and row["name"] in by_name and "instructions" not in row:
            case = by_name[row["name"]]
            starting(case)
            try:
                row["instructions"] = _instructions.count(case)
            except AbsentError as reason:
                row["absent"]["instructions"] = str(reason)
            save(results, output)


def run_case(
    case: Case, settings: Settings = PLAIN, joined: peers.Peers | None = None, seed: int = 0,
    limits: Peaks | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One case as a row of JSON. A provider that is wrong against float64 gets no time."""
    row, joined = _blank(case), joined or peers.Peers()
    if case.metric == BYTES:
        _measure_memory(case, row)
        return row
    try:
        with record_decisions() as decisions:
            problem = _built(case)
            right = _gated(case, problem, row)
    except AbsentError as reason:
        row["absent"] = {"case": str(reason)}
        return row
    row["absent"].update(problem.absent)
    row["unfused"] = unfused(decisions)
    if problem.operations is not None:
        row["operations"], row["bytes"] = problem.operations, problem.bytes
    others, absent = joined.join(case, problem.workload)
    row["absent"].update(absent)
    if PEER in problem.random:  # peers are plain PyTorch like it, with random bits like its
        problem = replace(problem, random=problem.random | others.keys())
    right.update(_passing(others, problem, row, row["absent"]))
    if right:
        _time({**right, **_beside(row, limits)}, case, settings, seed, row)
    del problem, right
    gc.collect()
    return row


def time_again(
    row: dict[str, Any], case: Case, settings: Settings, visit: int, seed: int, limits: Peaks | None = None
) -> None:
    """Another visit of ``row``: the same providers on new tensors, which need no second check."""
    problem = _built(case)
    names = [name for name in row["samples"] if name != LIMIT]
    providers = {name: _device.local(problem.providers[name], case.device) for name in names}
    for provider in providers.values():
        provider()
    _time({**providers, **_beside(row, limits)}, case, settings, seed, row, visit)
    del problem, providers
    gc.collect()


def _beside(row: dict[str, Any], limits: Peaks | None) -> dict[str, Provider]:
    """The machine's limit as a provider, where the row promises a part of it. A GPU's does not change by the hour."""
    if row["limit_target"] is None or limits is None or row["device"] != "cpu":
        return {}
    found = limit(row["dtype"], row["operations"], row["bytes"], limits)
    return {} if found is None else {LIMIT: found}


def _built(case: Case) -> Problem:
    """The problem, in which our kernels are those of the backend that the case names.

    Raises:
        AbsentError: that backend does not work here, or does not serve the case.
    """
    if case.backend == "auto":
        return case.build()
    if (reason := unavailable(case.backend)) is not None:
        raise AbsentError(f"{case.backend}: {reason}")
    try:
        with use_backend(case.backend):  # of a backward the forward runs here
            problem = case.build()
    except BackendError as error:
        raise AbsentError(str(error)) from error
    run = problem.providers[OURS]

    def ours() -> Any:
        with use_backend(case.backend):
            return run()

    return replace(problem, providers={**problem.providers, OURS: ours})


def _blank(case: Case) -> dict[str, Any]:
    fields = ("name", "op", "direction", "dtype", "shape", "operations", "bytes", "metric", "limit_target",
              "rate_target", "speed_target", "device")  # fmt: skip
    plain = {name: getattr(case, name) for name in fields}
    empty = {"samples": {}, "busy": [], "visits": [], "wrong": {}, "absent": {}, "unfused": []}
    return {**plain, "sizes": dict(case.sizes), "targets": dict(case.targets), **empty}


def _gated(case: Case, problem: Problem, row: dict[str, Any]) -> dict[str, Provider]:
    """The case's own providers that are right, ready to be timed."""
    local: dict[str, Provider] = {name: _device.local(run, case.device) for name, run in problem.providers.items()}
    return _passing(local, problem, row, row["wrong"])


def _passing(
    providers: dict[str, Provider], problem: Problem, row: dict[str, Any], raised: dict[str, str]
) -> dict[str, Provider]:
    """Those that pass the check. What one raises goes into ``raised``: ours and torch must run, a peer need not."""
    right = {}
    for name, provider in providers.items():
        try:
            outputs = provider()
        except Exception as error:  # the other rows go on
            raised[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        slack = 1.0 if name == OURS else PEER_SLACK
        wrong = "" if name in problem.random else _gate(outputs, problem.check, slack)
        if wrong:
            row["wrong"][name] = wrong
        else:
            right[name] = provider
    return right


def _gate(outputs: Any, check: Callable[[Any], list[Comparison]], slack: float) -> str:
    """Why a provider gets no time, or nothing. ``slack`` is how many times what is allowed it may be off."""
    try:
        return "; ".join(str(found) for found in check(outputs) if found.ratio > slack)
    except Exception as error:  # outputs of another number or shape
        return f"{type(error).__name__}: {error}"


def _time(
    right: Mapping[str, Provider], case: Case, settings: Settings, seed: int, row: dict[str, Any], visit: int = 0
) -> None:
    flush = flusher(case.device) if settings.flush else None
    calls = {name: found["calls"] for name, found in row["samples"].items()}
    timing = measure(right, settings.seconds(case), seed + visit, flush, calls)
    for name, samples in timing.samples.items():
        found = row["samples"].setdefault(name, {"calls": samples.calls, "wall": [], "cpu": []})
        found["wall"] += samples.wall
        found["cpu"] += samples.cpu
    row["busy"] += timing.busy
    row["visits"] += [visit] * len(timing.busy)
    row["clock"] = next(iter(right.values())).clock
    row["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _measure_memory(case: Case, row: dict[str, Any]) -> None:
    """The peaks of memory, taken in a process of its own: what a heap keeps from earlier rows is not there."""
    try:
        found = _processes.in_child(memory_of, case, torch.get_num_threads())
    except AbsentError as reason:
        row["absent"] = {"case": str(reason)}
        return
    row.update(found)
    row["busy"] = [False] * max((len(x["wall"]) for x in row["samples"].values()), default=0)
    row["visits"] = [0] * len(row["busy"])


def memory_of(case: Case) -> dict[str, Any]:
    """The parts of a row that hold peaks of memory; ``wall`` has bytes."""
    from pytransformer.benchmarks._memory import peak_memory

    row: dict[str, Any] = {"wrong": {}, "absent": {}, "samples": {}}
    with record_decisions() as decisions:
        problem = _built(case)
        right = _gated(case, problem, row)
    for name in right:
        found = peak_memory(problem.providers[name], case.device)
        row["samples"][name] = {"calls": 1, "wall": found, "cpu": []}
    return {**row, "unfused": unfused(decisions)}


def unfused(decisions: Sequence[Decision]) -> list[str]:
    """Why no kernel of ours served, for each op where that is so."""
    served = [d for d in decisions if d.backend == "reference" and d.reasons]
    found = {f"{d.op}: " + "; ".join(f"{name}: {why}" for name, why in d.reasons.items()) for d in served}
    return sorted(found)
