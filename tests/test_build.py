"""The compiled modules: one OpenMP runtime, the choice of an instruction set, threads, forks, a missing compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytransformer import backends

ROOT = Path(__file__).parent.parent
built = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason="the CPU kernels are not built")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def python(code, **environment):
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )  # fmt: skip


@built
@linux
@pytest.mark.parametrize("first", ["torch", "pytransformer"])
def test_one_openmp_runtime(first):
    done = python(
        f"""
import {first}
import torch
from pytransformer import ops
ops.layer_norm(torch.ones(512, 512), None, backend="cpu")
torch.ones(1000, 1000).sum()
names = {{line.split()[-1] for line in open("/proc/self/maps")}}
found = sorted(name for name in names if "gomp" in name.rsplit("/", 1)[-1])
assert len(found) == 1, found
"""
    )
    assert done.returncode == 0, done.stderr


@built
def test_pytransformer_isa_is_obeyed():
    code = "from pytransformer.backends import cpu; print(cpu.isa())"
    done = python(code, PYTRANSFORMER_ISA="scalar")
    assert done.stdout.strip() == "scalar", done.stderr


@built
def test_an_unknown_isa_names_the_choices():
    from pytransformer.backends import cpu

    code = "from pytransformer.backends import cpu; print(cpu.isa())"
    done = python(code, PYTRANSFORMER_ISA="nonsense")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: pytransformer: instruction set must be one of scalar"), done.stderr
    assert last.endswith("; got 'nonsense'"), last
    with pytest.raises(ValueError, match=r"must be one of .*; got 'nonsense'"):
        cpu.set_isa("nonsense")
    for name, supported in cpu.isa_status().items():
        assert name in last
        if not supported:
            with pytest.raises(ValueError, match=f"does not run the instruction set '{name}'"):
                cpu.set_isa(name)


@built
@linux
def test_set_num_threads_is_obeyed():
    done = python(
        """
import os, torch
torch.set_num_threads(1)
from pytransformer import ops
before = len(os.listdir("/proc/self/task"))
ops.layer_norm(torch.ones(4096, 512), None, backend="cpu")
after = len(os.listdir("/proc/self/task"))
assert after == before, f"{after - before} threads were started"
torch.set_num_threads(3)
ops.layer_norm(torch.ones(4096, 512), None, backend="cpu")
after = len(os.listdir("/proc/self/task"))
assert after >= before + 2, f"{after - before} threads were started, 2 were allowed"
"""
    )
    assert done.returncode == 0, done.stderr


@built
@linux
def test_a_forked_child_does_not_hang():
    done = python(
        """
import multiprocessing, torch
from pytransformer import ops
x, w = torch.randn(4096, 512), torch.ones(512)
q = torch.randn(2, 4, 64, 32)

def work(queue=None):
    # A few elements: torch's own parallel loops do hang in a forked child.
    found = [y.flatten()[:9].tolist() for y in (ops.layer_norm(x, w), ops.attention(q, q, q))]
    return found if queue is None else queue.put(found)

wanted = work()
context = multiprocessing.get_context("fork")
queue = context.Queue()
child = context.Process(target=work, args=(queue,), daemon=True)
child.start()
found = queue.get(timeout=60)
assert found == wanted, (found, wanted)
child.join(10)
assert child.exitcode == 0, child.exitcode
assert work() == wanted
"""
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_compiler_is_said_in_one_message(tmp_path):
    pytest.importorskip("pybind11")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path],
        cwd=ROOT,
        env={**os.environ, "CXX": "/nonexistent", "PYTRANSFORMER_CUDA": "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "needs a C++17 compiler with OpenMP" in done.stderr, done.stderr
    assert "found none (looked for /nonexistent)" in done.stderr
    assert "apt-get install g++" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_cuda_module_imports_without_a_driver():
    from pytransformer.backends import cuda

    report = cuda.report()
    if report is None:
        pytest.skip(f"cuda: {cuda.unavailable()}")
    assert report["runtime_version"] > 0
    assert bool(report["devices"]) != bool(report["error"])
    assert bool(cuda.unavailable()) == bool(report["error"])
