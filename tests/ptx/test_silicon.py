"""The runner against a GPU: the words that silicon/record.py wrote down, and those of the same kernels run here."""

from __future__ import annotations

import base64
import json
import lzma
from functools import cache

import pytest
import torch
from torch import Tensor

from ptx import build, emulator
from ptx.silicon import vectors

RECORDED = sorted((build.HERE.parent / "recorded").glob("silicon-*.json"))

pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable())),
    pytest.mark.skipif(not RECORDED, reason="no tests/recorded/silicon-*.json: tests/ptx/silicon/record.py makes one"),
]


@cache
def recording() -> dict:
    return json.loads(RECORDED[0].read_text())


@cache
def of_silicon(name: str) -> Tensor:
    """The recorded words, [slots, threads]."""
    record, kernel = recording()["kernels"][name], vectors.KERNELS[name]
    assert record["inputs"] == vectors.digest(kernel.words), "recorded with other inputs: record again"
    assert record["instructions"] == {str(slot): text for slot, text in vectors.instructions(name).items()}
    words = bytearray(lzma.decompress(base64.b85decode(record["outputs"])))
    return torch.frombuffer(words, dtype=torch.int32).view(kernel.outputs, kernel.threads)


def given(name: str) -> Tensor:
    kernel = vectors.KERNELS[name]
    return torch.frombuffer(bytearray(kernel.words.tobytes()), dtype=torch.int32).view(-1, kernel.threads)


@cache
def of_runner(name: str) -> Tensor:
    kernel = vectors.KERNELS[name]
    out = torch.zeros(kernel.outputs, kernel.threads, dtype=torch.int32)
    translated = emulator.translated(build.ptx_of(vectors.SOURCE, "90a"), name)
    with emulator.watch() as findings:
        emulator.launch(translated, (kernel.threads // kernel.block,), (kernel.block,), [given(name), out])
    assert not findings, findings
    return out


def test_everything_is_recorded():
    assert not recording()["failed"]
    assert recording()["kernels"].keys() == vectors.KERNELS.keys()


EXACT = ("convert_integers", "compare", "integers", "lanes", "barriers", "load_matrices", "store_matrices", "copies")


@pytest.mark.parametrize("name", EXACT)
def test_words_are_equal(name):
    silicon, runner = of_silicon(name), of_runner(name)
    wrong = {
        text: (silicon[slot] != runner[slot]).nonzero().flatten().tolist()[:8]
        for slot, text in vectors.instructions(name).items()
        if not torch.equal(silicon[slot], runner[slot])
    }
    assert torch.equal(silicon, runner), wrong
