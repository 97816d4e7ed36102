"""What ``pytransformer bench`` does, action by action; the arguments are ``pytransformer.cli``'s."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from pytransformer.benchmarks._case import Case
from pytransformer.benchmarks._suites import SUITES, WITH_PEERS, Chosen, suite, why_not

DEFAULT_OUTPUT = "pytransformer-bench.json"


def command(args: argparse.Namespace) -> int:
    """Runs one action; returns the exit code: 2 for what cannot be done, with the reason in one line."""
    actions = {"run": _run, "list": _list, "compare": _compare, "report": _report, "markdown": _markdown}
    try:
        return actions[args.action](args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("rich") is None:
        raise ValueError("pytransformer bench needs rich: pip install pytransformer[bench]")
    import torch

    from pytransformer.benchmarks import _run as runner
    from pytransformer.benchmarks import peers
    from pytransformer.benchmarks._table import LiveTable, print_results

    cases = _chosen(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    names = peers.chosen(args.peers, args.suite in WITH_PEERS, cases[0].device)
    settings = runner.Settings(args.quick, args.flush, names)
    output = Path(args.output or DEFAULT_OUTPUT)
    try:
        with LiveTable(sum(map(settings.visits, cases))) as live:
            results = runner.run(cases, output, args.suite, settings, resume=args.resume,
                                 instructions=args.instructions, starting=live.starting,
                                 finished=live.finished)  # fmt: skip
    except KeyboardInterrupt:
        print(f"stopped; what was done is in {output}, and --resume goes on with it", file=sys.stderr)
        return 130
    print_results(results)
    if args.suite == "complexity":
        from pytransformer.benchmarks.complexity import print_fits

        print_fits(results)
    _offer_instructions(results, args.instructions)
    print(f"every sample: {output}")
    return 1 if fell_short(results) else 0


def _offer_instructions(results: dict[str, Any], counted: bool) -> None:
    from pytransformer.benchmarks import _instructions
    from pytransformer.benchmarks._figures import too_noisy

    noisy = too_noisy(results)
    if noisy and not counted:
        reason = _instructions.why_not()
        how = "--resume --instructions counts theirs" if reason is None else f"and instructions cannot be: {reason}"
        print(f"{len(noisy)} rows are too noisy to compare by time; {how}")


def _chosen(args: argparse.Namespace) -> list[Case]:
    cases = suite(args.suite)
    reason = why_not(args.suite)
    if reason is not None:
        raise ValueError(f"bench: {reason}")
    words = {name: getattr(args, name) for name in ("op", "dtype", "shape", "direction")}
    return Chosen(**words, text=args.filter).of(cases)


def fell_short(results: dict[str, Any]) -> bool:
    """Is a row of ours wrong, or, in the suite that holds promises, does one miss its target by more than its noise?"""
    from pytransformer.benchmarks._case import OURS
    from pytransformer.benchmarks._figures import figures, raised_peaks

    if any(OURS in row["wrong"] for row in results["rows"]):
        return True
    limits, threads = raised_peaks(results), results["environment"]["threads"]
    return results["suite"] in ("cpu", "gpu") and any(
        figures(row, limits, threads).verdict == "missed" for row in results["rows"]
    )


def _list(args: argparse.Namespace) -> int:
    from pytransformer.benchmarks import peers
    from pytransformer.benchmarks._figures import promises

    width = max(map(len, SUITES))
    if args.suite is not None:
        for case in suite(args.suite):
            targets = promises(vars(case))
            print(f"{case.name}{f'  (target {targets})' if targets else ''}")
        return 0
    print("suites")
    for name, (_, told) in SUITES.items():
        reason = why_not(name)
        print(f"  {name.ljust(width)}  {len(suite(name)):3d} cases: {reason or told}")
    print("peers")
    for name, peer in peers.every().items():
        print(f"  {name.ljust(width)}  {peer.why_not() or peer.version()}")
    print("bench list --suite S lists the cases of a suite")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from pytransformer.benchmarks._compare import print_comparison
    from pytransformer.benchmarks._file import load
    from pytransformer.benchmarks._statistics import TOLERANCE

    tolerance = TOLERANCE if args.fail_if_slower is None else args.fail_if_slower
    slower = print_comparison(load(Path(args.before)), load(Path(args.after)), tolerance)
    return 1 if slower and args.fail_if_slower is not None else 0


def _report(args: argparse.Namespace) -> int:
    from pytransformer.benchmarks._file import load
    from pytransformer.benchmarks._report import write_report

    path = Path(args.output or Path(args.results).with_suffix(".html"))
    write_report(load(Path(args.results)), path)
    print(path)
    return 0


def _markdown(args: argparse.Namespace) -> int:
    from pytransformer.benchmarks._file import load
    from pytransformer.benchmarks.markdown import markdown, write_into

    table = markdown(load(Path(args.results)))
    if args.into is None:
        print(table)
    else:
        write_into(Path(args.into), table)
    return 0
