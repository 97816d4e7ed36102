"""The command line: what it prints, its exit codes, and that it notices what is wrong."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
import torch

from pytransformer import backends, cli, verify
from pytransformer.backends import cpu as cpu_backend
from pytransformer.benchmarks import _run as runner
from pytransformer.benchmarks import command, suite
from pytransformer.benchmarks import layer_norm as layer_norm_benchmark

WITHOUT_RICH = "import sys; sys.modules['rich'] = None; from pytransformer.cli import main; sys.exit(main(['info']))"
needs_cpu = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU kernels are not built")


def test_info_and_bench_without_rich():
    done = subprocess.run([sys.executable, "-c", WITHOUT_RICH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("torch", "Backends", "reference", "kernels in use" if not backends.unavailable("cpu") else "kernels"):
        assert word in done.stdout
    assert all(op in done.stdout for op in backends.OPS)


def test_bench_without_rich_says_what_to_install(monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "rich" else find(name, *rest))
    assert cli.main(["bench"]) == 2
    assert "pip install pytransformer[bench]" in capsys.readouterr().err


def test_choices_match_the_registry():
    assert backends.OPS == cli.OPS
    assert set(cli.BACKENDS) == set(backends.PACKAGES)


@needs_cpu
def test_verify_passes_and_restores_the_instruction_set(capsys):
    in_use = cpu_backend.isa()
    assert cli.main(["verify", "--op", "layer_norm", "--backend", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert cpu_backend.isa() == in_use
    assert "FAIL" not in printed
    assert all(f"cpu {isa}" in printed for isa in verify.instruction_sets(False))


def test_verify_of_a_backend_that_cannot_run(capsys):
    if torch.cuda.is_available():
        pytest.skip("every backend runs here")
    assert cli.main(["verify", "--backend", "cuda"]) == 2
    assert "cannot run here" in capsys.readouterr().err


@needs_cpu
@pytest.mark.parametrize("broken", ["wrong", "unwritten", "raises"])
def test_verify_notices_a_broken_kernel(monkeypatch, capsys, broken):
    module = backends.implementation("cpu", "layer_norm")
    right = module.layer_norm_fwd

    def layer_norm_fwd(*args):
        output, *rest = right(*args)
        if broken == "raises":
            raise RuntimeError("planted")
        return output * 1.01 if broken == "wrong" else torch.empty_like(output), *rest

    monkeypatch.setattr(module, "layer_norm_fwd", layer_norm_fwd)
    assert cli.main(["verify", "--op", "layer_norm", "--backend", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out


def tiny_case():
    return layer_norm_benchmark.case("fwd", torch.float32, 32, 64)


def arguments(output, **more):
    plain = {"action": "run", "suite": "layer_norm", "filter": "", "threads": None, "quick": True}
    return argparse.Namespace(**{**plain, "output": str(output), **more})


def test_bench_runs_a_case_and_saves_every_sample(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(layer_norm_benchmark, "cases", lambda: iter([tiny_case()]))
    monkeypatch.setattr(runner, "QUICK_SECONDS", 0.05)
    output = tmp_path / "deep" / "results.json"
    assert command(arguments(output)) == 0
    results = json.loads(output.read_text())
    assert results["finished"]
    (row,) = results["rows"]
    assert set(row["samples"]) == {"pytransformer", "torch"}
    assert all(len(s["wall"]) == len(s["cpu"]) >= 6 for s in row["samples"].values())
    assert results["environment"]["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "32x64 residual" in printed
    assert max(map(len, printed.splitlines())) <= 80 or not sys.stdout.isatty()

    assert command(argparse.Namespace(action="markdown", results=str(output))) == 0
    assert "| layer_norm | fwd float32 32x64 residual |" in capsys.readouterr().out
    assert command(argparse.Namespace(action="compare", before=str(output), after=str(output))) == 0
    assert "no difference" in capsys.readouterr().out or len(row["samples"]["torch"]["wall"]) < 20


def test_a_killed_run_leaves_what_was_done(tmp_path):
    def killed(results, index):
        raise KeyboardInterrupt

    output = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        runner.run([tiny_case(), tiny_case()], output, "test", quick=True, finished=killed)
    results = runner.load(output)
    assert len(results["rows"]) == 1
    assert not results["finished"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("argv", [["bench", "run", "--suite", "nothing"], ["bench", "compare", "a.json", "b.json"]])
def test_bench_refuses_in_one_line(argv, capsys):
    assert cli.main(argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_bench_list(capsys):
    assert cli.main(["bench", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in suite("default"))
