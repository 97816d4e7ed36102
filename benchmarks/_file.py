"""The JSON of a run: every sample and where it was taken. Written in one step after each row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 2
# What must be the same for two halves of one run to belong together.
SAME = ("cpu", "gpu", "threads", "isa", "commit", "dirty", "versions")

Results = dict[str, Any]


def save(results: Results, path: Path) -> None:
    """Writes ``path`` in one step: a reader finds the file before or after, never a half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(_text(results))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _text(results: Results) -> str:
    """Rows a line each, for a reader of differences; all of it indented would take as long as some rows do."""
    rows = ",\n".join(map(json.dumps, results["rows"]))
    head = json.dumps({key: value for key, value in results.items() if key != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n'


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


def resumable(path: Path, suite: str, environment: dict[str, Any], settings: dict[str, Any]) -> Results:
    """What ``path`` holds, to be gone on with.

    Raises:
        ValueError: it is of another suite, machine, commit or way of timing; its rows would not compare.
    """
    results = load(path)
    if results["suite"] != suite:
        raise ValueError(f"bench: --resume: {path} is of suite {results['suite']!r}, not {suite!r}")
    then = {**results["environment"], **results["settings"]}
    now = {**environment, **settings}
    for name in (*SAME, *settings):
        if then.get(name) != now[name]:
            raise ValueError(f"bench: --resume: {name} of {path} is {then.get(name)!r}, and now {now[name]!r}")
    return results
