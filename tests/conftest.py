"""Fixtures of the tests: seeds, and every backend and instruction set that this machine runs.

Triton's interpreter is a matter of the process: triton reads ``TRITON_INTERPRET`` when it is imported. So it has a
session of its own, ``TRITON_INTERPRET=1 pytest``, which runs the tests over backends on Triton kernels alone, and of
long parametrisations a part, for the interpreter is slow. ``make test`` runs both sessions.

On a machine with a GPU the tests over backends run on it besides, by the CUDA kernels and by Triton's.

Without one, the CUDA kernels have a session of their own, ``PYTRANSFORMER_PTX=1 pytest``: their PTX runs on the CPU
under ``tests/ptx``, as compiled for each architecture. ``make test-ptx`` runs it; ``make test`` has the short list of
``ptx/test_ops.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import pytransformer

sys.path.insert(0, str(Path(__file__).parent))  # helpers.py and compare.py, under importlib's import mode

from helpers import EMULATED, INTERPRETED, ON_GPU

from pytransformer import backends
from pytransformer._parity import unwritten_is_nan
from pytransformer.backends import cpu


def instruction_sets():
    """Those built, and whether this CPU runs them. An emulated one is there for CPUs that lack the real one."""
    built = cpu.isa_status() if backends.unavailable("cpu") is None else {}
    emulated = {f"{isa}_emulated" for isa, runs in built.items() if runs}
    return {isa: runs for isa, runs in built.items() if isa not in emulated}


ISAS = instruction_sets()

# How many examples hypothesis makes of a test: always the same few, and for ``make fuzz`` many. A backend stays.
_checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
_any = settings(deadline=None, suppress_health_check=_checks)
_slow = INTERPRETED or EMULATED
settings.register_profile("some", _any, derandomize=True, database=None, max_examples=4 if _slow else 20)
settings.register_profile("many", _any, max_examples=200 if _slow else 2000, print_blob=True)
settings.load_profile("some")


@pytest.fixture(autouse=True)
def _seed():
    torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a stack trace of each call for a GPU to come
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


def backend_names():
    if INTERPRETED:
        return ["triton-interpreted"]
    if EMULATED:
        return ["cuda_emulated-80", "cuda_emulated-90a"]
    return ["reference", *(f"cpu-{isa}" for isa in ISAS or ("not built",)), *ON_GPU]


@pytest.fixture(params=["reference", "auto"])
def both_backends(request):
    """For tests of models: the plain path, and whatever serves here."""
    with pytransformer.use_backend(request.param):
        yield request.param


@pytest.fixture(params=backend_names())
def backend_isa(request, monkeypatch):
    """The name of a backend, its outputs poisoned; for the CPU kernels with one instruction set in use."""
    name, _, isa = request.param.partition("-")
    if name == "reference":
        yield name
    elif name in ON_GPU:
        with torch.device("cuda"), unwritten_is_nan():  # a test's tensors are on the GPU, and so is its oracle
            yield name
    elif name == "triton":
        if backends.unavailable(name) is not None:
            pytest.skip(f"Triton kernels: {backends.unavailable(name)}")
        monkeypatch.setitem(backends.ORDER, "cpu", ("cpu", "triton", "reference"))
        with unwritten_is_nan():
            yield name
    elif name == "cuda_emulated":
        yield from _under_the_ptx_runner(isa)
    else:
        yield from _with_instruction_set(isa, monkeypatch)


def _with_instruction_set(isa, monkeypatch):
    if not ISAS:
        pytest.skip(f"CPU kernels: {backends.unavailable('cpu')}")
    if not ISAS[isa]:
        pytest.skip(f"this CPU does not run {isa}")
    outer = cpu.isa()
    poison_outputs(monkeypatch)
    cpu.set_isa(isa)
    yield "cpu"
    cpu.set_isa(outer)


def _under_the_ptx_runner(arch):
    from ptx import build

    if build.unavailable() is not None:
        pytest.skip(f"CUDA kernels: {build.unavailable()}")
    from ptx import backend

    with backend.installed(arch) as name, unwritten_is_nan():
        yield name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """What the CUDA kernels leave to Triton's, float32 attention say, is skipped with the reason that they give."""
    try:
        return (yield)
    except backends.BackendError as error:
        if not getattr(item, "funcargs", {}).get("backend_isa", "").startswith("cuda"):
            raise
        pytest.skip(str(error))


# Of a parametrised test with many cases the interpreter, and the PTX runner, runs every n-th one; 0 leaves it out.
INTERPRETED_PART = {
    "test_every_combination": 17,
    "test_every_tail": 5,
    "test_pages": 2,
    "test_rows": 3,
    "test_dropout_is_the_references": 3,
    "test_views": 2,
    "test_against_the_oracle": 25,
    "test_few_queries_and_many_keys": 4,
    "test_several_tiles": 0,
    "test_heads_larger_than_a_cache": 0,
    "test_sizes": 0,
    "test_dropout_over_several_tiles": 0,
    "test_dropout_and_softcap": 11,
    "test_layouts": 8,
    "test_mask_layouts": 3,
    "test_what_is_behind_the_mask_never_leaks": 10,
    "test_poison_reaches_the_queries_that_see_it_only": 5,
    "test_rows_that_see_nothing": 3,
    "test_padded_queries_may_hold_nan": 3,
    "test_repeated_runs_are_bitwise_equal": 5,
    "test_lse_and_weights": 4,
    "test_activations": 5,
    "test_extreme_hidden": 5,
    "test_shapes": 4,
}


def patch_interpreted_functions_once():
    """Triton patches its language anew at every call of a device function, which takes half of the interpreter's time.

    A launch has patched ``tl`` already; what is left are the modules of Triton's own library, once each.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        module = self.fn.__globals__
        if module["__name__"] not in patched and tl not in module.values():
            interpreter._patch_lang(self.fn)
            patched.add(module["__name__"])
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def make_interpreted_products_alike():
    """In float64, rounded once: numpy sums a product's terms in an order that hangs on its shape and on the processor.

    A GPU sums them one after the other, so that the backward's scores are the very bits that the lse was made of.
    """
    import numpy as np
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, *precision):
        product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


if INTERPRETED and backends.unavailable("triton") is None:
    patch_interpreted_functions_once()
    make_interpreted_products_alike()


def pytest_collection_modifyitems(config, items):
    """Each session runs its own tests: those over backends, and those marked for it."""
    seen = {}
    kept, dropped = [], []
    for item in items:
        marked = item.get_closest_marker("interpreted") is not None
        of_session = (marked and INTERPRETED) or "backend_isa" in item.fixturenames
        of_the_runner = EMULATED and item.path.parent.name == "ptx"
        wanted = of_session or of_the_runner if INTERPRETED or EMULATED else not marked
        if (INTERPRETED or EMULATED) and wanted and not of_the_runner:
            test = item.path, item.originalname
            count = seen[test] = seen.get(test, -1) + 1
            part = INTERPRETED_PART.get(item.originalname, 1)
            wanted = part > 0 and count % part == 0
        (kept if wanted else dropped).append(item)
    items[:] = kept
    if dropped:
        config.hook.pytest_deselected(items=dropped)


class _Poisoned:
    """A module, but its ``empty`` returns NaN: what a kernel forgets to write cannot pass for a result."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)

    def empty(self, *size, **options):
        x = self._module.empty(*size, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x


def poison_outputs(monkeypatch):
    from pytransformer.backends.cpu import _memory  # which needs the module to be built

    for name in ("torch", "_cpu"):
        monkeypatch.setattr(_memory, name, _Poisoned(getattr(_memory, name)))
