"""The command line: what it prints, its exit codes, and that it notices what is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pytransformer import backends, cli, verify
from pytransformer.backends import cpu as cpu_backend

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


def cuda_report(driver=13020, runtime=13000, capability=None, error="the runtime's own words"):
    devices = [] if capability is None else [{"name": "GPU", "capability": capability}]
    return {"devices": devices, "error": "" if devices else error, "driver_version": driver, "runtime_version": runtime}


CUDA_STATES = {
    "no nvcc at build time": (None, "its module is not built: there was no nvcc when pytransformer was installed"),
    "no driver": (cuda_report(driver=0), "no NVIDIA driver is installed"),
    "an old driver": (
        cuda_report(driver=12020),
        "the NVIDIA driver supports CUDA 12.2, and the kernels were built with CUDA 13.0",
    ),
    "no device": (cuda_report(), "the runtime's own words"),
    "an old device": (cuda_report(capability=(7, 5)), "need compute capability 8.0, and the GPU has 7.5"),
    "a device": (cuda_report(capability=(9, 0)), None),
}


@pytest.mark.parametrize("state", CUDA_STATES)
def test_info_tells_the_state_of_cuda(monkeypatch, capsys, state):
    from pytransformer.backends import cuda

    report, reason = CUDA_STATES[state]
    if reason is None:
        pytest.importorskip("pytransformer._cuda", reason="the CUDA module is not built")
    monkeypatch.setattr(cuda, "report", lambda: report)
    monkeypatch.setattr(cuda, "_import_error", None)
    backends._unavailable.cache_clear()
    try:
        assert cli.main(["info"]) == 0
    finally:
        backends._unavailable.cache_clear()
    lines = {
        words[0]: words[1] for line in capsys.readouterr().out.splitlines() if len(words := line.split(None, 1)) > 1
    }
    assert (reason or "available") in lines["cuda"]
    if not torch.cuda.is_available():
        assert (reason or "sees a device") in lines["none"]


def test_a_module_that_does_not_load_says_why():
    from pytransformer.backends import cuda

    reason = cuda._not_built(ImportError("undefined symbol: cudaMalloc"))
    assert reason == "its module cannot be loaded (undefined symbol: cudaMalloc)"


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
    right, calls = module.layer_norm_fwd, []

    def layer_norm_fwd(*args):
        output, *rest = right(*args)
        if broken == "raises":
            raise RuntimeError("planted")
        if broken == "unwritten":
            return torch.empty_like(output), *rest
        calls.append(1)  # wrong once: what fails is measured on many more inputs before it is said to fail
        return output * (1.01 if len(calls) == 1 else 1), *rest

    monkeypatch.setattr(module, "layer_norm_fwd", layer_norm_fwd)
    assert cli.main(["verify", "--op", "layer_norm", "--backend", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out
