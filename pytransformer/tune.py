"""``pytransformer tune``: measures the Triton kernels' configurations on this machine's GPU and keeps the best.

Nothing is timed when a kernel is first called: configurations come from a table. This command makes a better one for
the GPU at hand; where it lies, and when it is read, says ``kernels/_table.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pytransformer.backends import unavailable


def why_not() -> str | None:
    """Why nothing can be measured here, or None."""
    if (reason := unavailable("triton")) is not None:
        return reason
    return None if torch.cuda.is_available() else "torch sees no GPU, and the interpreter's time tells nothing"


def main(ops: Sequence[str], output: str | None) -> int:
    """Runs the command; the exit code: 0 done, 1 what cannot be done, with the reason."""
    if (reason := why_not()) is not None:
        print(f"pytransformer tune: needs a GPU that Triton reaches: {reason}", file=sys.stderr)
        return 1
    from pytransformer.kernels import _configs, _table, _tune

    arch = _configs.architecture(torch.device("cuda"))
    path = Path(output) if output is not None else _table.default_path(arch)
    problems = (p for p in _tune.problems(arch) if not ops or p.op in ops)
    try:
        measured = measure(problems, arch, path)
    except (ValueError, RuntimeError) as error:
        print(f"pytransformer tune: {error}", file=sys.stderr)
        return 1
    changed = sum(m.best != m.problem.candidates[0] for m in measured)
    print(f"{changed} of {len(measured)} choices are better than the ones built in; the table: {path}")
    if path != _table.default_path(arch):
        print(f"{_table.VARIABLE}={path} makes kernels read it")
    print("`pytransformer verify --backend triton` checks the kernels with it")
    return 0


def measure(problems: Any, arch: str, path: Path, **timing: Any) -> list[Any]:
    """Measures, printing a line for each problem, and writes the table, on top of what the same device's one holds.

    What was measured is written after every problem: a run that is stopped keeps what it has.
    """
    from pytransformer.kernels import _table, _tune

    known = _known(path, arch)
    choices = {} if known is None else dict(known.choices)
    times = {} if known is None else dict(known.milliseconds)

    def done(m: Any) -> None:
        print(line(m), flush=True)
        choices[m.problem.key], times[m.problem.key] = m.best, m.times[m.best]
        _table.Table(arch, _table.device_name(), version("triton"), choices, times).save(path)

    with _table.built_in_only():
        found: list[Any] = _tune.tune(problems, done=done, **timing)
    _table.in_use.cache_clear()
    return found


def _known(path: Path, arch: str) -> Any:
    """What the file holds of this device, or None; what is no table is written over."""
    from pytransformer.kernels import _table

    try:
        found = _table.load(path)
    except ValueError:
        return None
    return found if _table.mismatch(found, arch) is None else None


def line(m: Any) -> str:
    """What was measured, in a line: the choice, its time, and what the built-in one takes."""
    built_in = m.problem.candidates[0]
    before = f"{m.times[built_in]:.4f} ms" if built_in in m.times else "does not run here"
    failed = f", {len(m.failed)} do not run here" if m.failed else ""
    same = "as built in" if m.best == built_in else f"built in: {words(built_in)}, {before}"
    return f"{m.problem.key}: {words(m.best)}, {m.times[m.best]:.4f} ms ({same}; {len(m.times)} timed{failed})"


def words(choice: Any) -> str:
    """A choice as people read it."""
    if isinstance(choice, bool):
        return "one kernel" if choice else "torch's product, then one pass"
    return f"{'x'.join(map(str, choice.tile))} {choice.num_warps} warps {choice.num_stages} stages"
