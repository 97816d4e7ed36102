"""Fixtures of the tests: seeds, and every backend and instruction set that this machine runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers.py and compare.py, under importlib's import mode

from pytransformer import backends
from pytransformer.backends import cpu

ISAS = cpu.isa_status() if backends.unavailable("cpu") is None else {}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["reference", *(f"cpu-{isa}" for isa in ISAS or ("not built",))])
def backend_isa(request, monkeypatch):
    """The name of a backend; for the CPU kernels with one instruction set in use and its outputs poisoned."""
    name, _, isa = request.param.partition("-")
    if name == "reference":
        yield name
        return
    if not ISAS:
        pytest.skip(f"CPU kernels: {backends.unavailable('cpu')}")
    if not ISAS[isa]:
        pytest.skip(f"this CPU does not run {isa}")
    outer = cpu.isa()
    poison_outputs(monkeypatch)
    cpu.set_isa(isa)
    yield name
    cpu.set_isa(outer)


class _PoisonedTorch:
    """torch, but ``empty`` returns NaN: what a kernel forgets to write cannot pass for a result."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*size, **options):
        x = torch.empty(*size, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x


def poison_outputs(monkeypatch):
    for op in backends.OPS:
        if backends.has_op("cpu", op):
            module = importlib.import_module(f"pytransformer.backends.cpu.{op}")
            monkeypatch.setattr(module, "torch", _PoisonedTorch())
