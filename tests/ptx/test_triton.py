"""The library's Triton kernels as compiled for sm_80, on the runner: an independent check of both.

Triton's PTX has layouts, swizzles and pipelines that nobody here wrote; outputs and gradients must still be those of
the float64 reference, without a race.
"""

from __future__ import annotations

import pytest
import test_attention as attention_cases
import test_ffn as ffn_cases
import test_layer_norm as layer_norm_cases
import torch
from helpers import EMULATED, INTERPRETED, check

from ptx import build, emulator
from pytransformer import backends
from pytransformer._parity import unwritten_is_nan

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable())),
    pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is on: nothing is compiled"),
]


@pytest.fixture(params=["plain", "detectors"])
def compiled(request, monkeypatch):
    """The backend ``triton`` for CPU tensors, its kernels compiled for sm_80."""
    from ptx import triton_launch

    monkeypatch.setattr(backends, "_unavailable", lambda name: None)
    monkeypatch.setitem(backends.ORDER, "cpu", ("cpu", "triton", "reference"))
    options = {"races": True, "seed": 1} if request.param == "detectors" else {}
    with triton_launch.on_the_runner("sm80"), unwritten_is_nan(), emulator.watch(**options) as findings:
        yield "triton"
    assert not findings, findings


def test_layer_norm(compiled):
    tensors = layer_norm_cases.make((5, 300), torch.bfloat16)
    check("layer_norm", tensors, {"dropout_p": 0.3, "seed": 3, "prenorm": True}, compiled)


def test_ffn(compiled):
    check("ffn", ffn_cases.make((70,), 48, 80, 33, dtype=torch.bfloat16), {"activation": "gelu"}, compiled)


@pytest.mark.parametrize("mask", ["causal", "everything"] if EMULATED else ["causal"])
def test_attention(compiled, mask):
    tensors, options = attention_cases.case("ragged", mask, torch.bfloat16)
    check("attention", tensors, options, compiled)


def test_float32_matrix_multiplication_in_tf32_pieces(compiled):
    check("ffn", ffn_cases.make((20,), 33, 40, 17), {"activation": "relu"}, compiled)
