"""The command ``pytransformer``: ``info``, ``verify``, ``tune`` and ``bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

OPS = ("attention", "layer_norm", "ffn", "linear", "linear_cross_entropy", "embedding")
BACKENDS = ("cpu", "cuda", "triton", "reference")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    args = _parser().parse_args(argv)
    code: int = args.run(args)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pytransformer", description="Fused Transformer kernels for CPUs and GPUs.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="versions, CPU, GPUs, and each backend: available or why not")
    info.set_defaults(run=_info)
    verify = commands.add_parser("verify", help="check every kernel against float64 on this machine")
    verify.add_argument("--op", action="append", choices=OPS, default=[], help="only this op (may be repeated)")
    verify.add_argument("--backend", choices=BACKENDS, help="only this backend")
    verify.add_argument("--all-isas", action="store_true", help="also the instruction sets emulated for tests")
    verify.set_defaults(run=_verify)
    tune = commands.add_parser("tune", help="measure the Triton kernels' configurations on this GPU, and use the best")
    tune.add_argument("--op", action="append", choices=OPS, default=[], help="only this op (may be repeated)")
    tune.add_argument("--output", metavar="F.json", help="where the table goes (default: the user's cache directory)")
    tune.set_defaults(run=_tune)
    bench = commands.add_parser("bench", help="time the ops and a real model against plain PyTorch")
    _add_bench(bench)
    return parser


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.set_defaults(
        run=_bench, action="run", suite="default", output=None, threads=None, quick=False, filter="", op=[], dtype=[],
        shape=[], direction=[], resume=False, flush=False, peers="auto", instructions=False,
    )  # fmt: skip
    actions = bench.add_subparsers(metavar="action")
    run = actions.add_parser("run", help="run a suite, print its table and save every sample")
    run.add_argument("--suite", default="default", help="default, ops, cpu, gpu, models, complexity, memory, "
                                                        "overhead, or an op's name")  # fmt: skip
    run.add_argument("--output", metavar="F.json", help="where the samples go (default: pytransformer-bench.json)")
    run.add_argument("--resume", action="store_true", help="keep the rows that the output has, and run the others")
    for name, example in (("op", "attention"), ("dtype", "bf16"), ("shape", "S=512"), ("direction", "bwd")):
        run.add_argument(f"--{name}", type=_words, default=[], metavar="A,B", help=f"only these, such as {example}")
    run.add_argument("--filter", default="", metavar="TEXT", help="only the cases whose name contains this")
    run.add_argument("--threads", type=_positive, help="CPU threads (default: torch's own choice)")
    run.add_argument("--quick", action="store_true", help="a fifth of the time, wider intervals")
    run.add_argument("--flush", action="store_true", help="empty the caches before each sample")
    run.add_argument("--instructions", action="store_true",
                     help="count instructions (valgrind) for the rows that are too noisy to time")  # fmt: skip
    run.add_argument("--peers", default="auto", metavar="A,B",
                     help="auto: those installed, in the suites cpu, gpu and models; all; none; or names")  # fmt: skip
    run.set_defaults(action="run")
    listing = actions.add_parser("list", help="the suites and the peers, or the cases of a suite")
    listing.add_argument("--suite", default=None)
    listing.set_defaults(action="list")
    compare = actions.add_parser("compare", help="a verdict for each row of two runs")
    compare.add_argument("before", metavar="A.json")
    compare.add_argument("after", metavar="B.json")
    compare.add_argument("--fail-if-slower", type=_fraction, metavar="5%", help="exit 1 if a row is slower by more")
    compare.set_defaults(action="compare")
    report = actions.add_parser("report", help="one HTML page of a run: tables and plots")
    report.add_argument("results", metavar="F.json")
    report.add_argument("--output", metavar="F.html", help="the page (default: beside the results)")
    report.set_defaults(action="report")
    markdown = actions.add_parser("markdown", help="a run's table for a README")
    markdown.add_argument("results", metavar="F.json")
    markdown.add_argument("--into", metavar="README.md", help="put it between this file's table marks")
    markdown.set_defaults(action="markdown")


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _fraction(text: str) -> float:
    """``5%`` or ``0.05``."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a share such as 5% or 0.05, got {text!r}") from None
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be from 0% to below 100%, got {text!r}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _version() -> str:
    from importlib.metadata import version

    return f"pytransformer {version('pytransformer')}"


def _info(args: argparse.Namespace) -> int:
    from pytransformer._info import print_info

    print_info()
    return 0


def _verify(args: argparse.Namespace) -> int:
    from pytransformer.verify import main as run_verify

    return run_verify(args.op, args.backend, args.all_isas)


def _tune(args: argparse.Namespace) -> int:
    from pytransformer.tune import main as run_tune

    return run_tune(args.op, args.output)


def _bench(args: argparse.Namespace) -> int:
    import importlib

    code: int = importlib.import_module("pytransformer.benchmarks").command(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
