"""The benchmarks: one declarative file per op, and the harness that runs them. Installed as
``pytransformer.benchmarks``; the command is ``pytransformer bench``.

    _case.py         what a benchmark declares           _figures.py   what the samples say
    _timing.py       measuring and its statistics        _table.py     the terminal's table (needs rich)
    _environment.py  the machine and its limits          markdown.py   the README's table
    _run.py          the loop, and the JSON              _compare.py   two runs side by side
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path

OPS = ("attention", "layer_norm", "ffn", "linear_cross_entropy", "embedding")
DEFAULT_OUTPUT = "pytransformer-bench.json"


def suite(name: str) -> list:
    """The cases of a suite: ``default`` (the short cases), ``ops``, ``models`` or one op's name.

    Raises:
        ValueError: there is no suite of this name.
    """
    modules = {"default": (*OPS, "models"), "ops": OPS, "models": ("models",), **{op: (op,) for op in OPS}}
    if name not in modules:
        raise ValueError(f"bench: --suite must be one of {', '.join(modules)}; got {name!r}")
    found = [case for stem in modules[name] for case in importlib.import_module(f"{__name__}.{stem}").cases()]
    return [case for case in found if case.short] if name == "default" else found


def command(args: argparse.Namespace) -> int:
    """Runs ``pytransformer bench``; returns the exit code."""
    actions = {"run": _run_suite, "list": _list_cases, "compare": _compare_runs, "markdown": _print_markdown}
    try:
        return actions[args.action](args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _run_suite(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("rich") is None:
        print("pytransformer bench needs rich: pip install pytransformer[bench]", file=sys.stderr)
        return 2
    from pytransformer.benchmarks import _run as runner
    from pytransformer.benchmarks._table import LiveTable, print_results

    cases = runner.chosen(suite(args.suite), args.filter)
    if not cases:
        raise ValueError(f"bench: no case of suite {args.suite!r} contains {args.filter!r}")
    output = Path(args.output or DEFAULT_OUTPUT)
    try:
        with LiveTable(len(cases)) as live:
            results = runner.run(cases, output, args.suite, args.threads, args.quick, live.starting, live.finished)
    except KeyboardInterrupt:
        print(f"stopped; what was done is in {output}", file=sys.stderr)
        return 130
    print_results(results)
    print(f"every sample: {output}")
    return 1 if any("pytransformer" in row["wrong"] for row in results["rows"]) else 0


def _list_cases(args: argparse.Namespace) -> int:
    for name in ("default", "ops", "models", *OPS):
        print(f"{name}: {len(suite(name))} cases")
    for case in suite("ops") + suite("models"):
        print(f"  {case.name}{'' if case.short else '  (not in default)'}")
    return 0


def _compare_runs(args: argparse.Namespace) -> int:
    from pytransformer.benchmarks._compare import print_comparison
    from pytransformer.benchmarks._run import load

    print_comparison(load(Path(args.before)), load(Path(args.after)))
    return 0


def _print_markdown(args: argparse.Namespace) -> int:
    from pytransformer.benchmarks._run import load
    from pytransformer.benchmarks.markdown import markdown

    print(markdown(load(Path(args.results))))
    return 0
