"""The library's Triton kernels as compiled for sm_80 and sm_90, on the runner: an independent check of both.

Triton's PTX has layouts, swizzles and pipelines that nobody here wrote, and on Hopper products of whole warpgroups
(wgmma), which read shared memory in their own time; outputs and gradients must still be those of the float64 reference,
without a race. Boxes of tensors (TMA) none of the library's asks for: a product of ``triton_kernels`` does.
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

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable())),
    pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter is on: nothing is compiled"),
]


@pytest.fixture(params=["sm80-plain", "sm80-detectors", "sm90-plain", "sm90-detectors"])
def compiled(request, monkeypatch):
    """The backend ``triton`` for CPU tensors, its kernels compiled for an architecture."""
    from ptx import triton_launch

    arch, _, how = request.param.partition("-")
    if request.param == "sm90-detectors" and triton.__version__ < "3.7":
        pytest.skip("Triton before 3.7 puts no proxy fence between cp.async and wgmma, and the runner says so")
    monkeypatch.setattr(backends, "_unavailable", lambda name: None)
    monkeypatch.setitem(backends.ORDER, "cpu", ("cpu", "triton", "reference"))
    options = {"races": True, "seed": 1} if how == "detectors" else {}
    with triton_launch.on_the_runner(arch), unwritten_is_nan(), emulator.watch(**options) as findings:
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


@pytest.mark.parametrize("mask", ["none", "window_left"] if EMULATED else ["none"])
def test_attention_over_several_tiles(compiled, mask):
    """More key blocks than a pipeline has stages, and a narrow head."""
    sizes = B, H, G, T, S, D, Dv = 1, 2, 1, 70, 330, 24, 40
    tensors = attention_cases.qkv(*sizes, dtype=torch.bfloat16)
    check("attention", tensors, attention_cases.MASKS[mask](B, H, T, S) | {"enable_gqa": True}, compiled)


def test_float32_matrix_multiplication_in_tf32_pieces(compiled):
    check("ffn", ffn_cases.make((20,), 33, 40, 17), {"activation": "relu"}, compiled)


MADE_UNSHOWN = "no fence.proxy.async since the mbarrier"  # which CUDA's guide asks for, and Triton leaves out


@pytest.mark.skipif(triton.__version__ < "3.7", reason="Triton before 3.7 gives such kernels other parameters")
@pytest.mark.parametrize("options", [{}, {"seed": 3}, {"races": True}, {"races": True, "seed": 4}], ids=str)
def test_products_of_boxes(options):
    """Tiles that Hopper's copy engine brings (TMA), swizzled, as Triton asks for them by tensor descriptors."""
    from ptx import triton_kernels, triton_launch

    M, N, K = 120, 200, 232  # the last tiles end beyond them
    a, b, c = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16(), torch.full((M, N), torch.nan).bfloat16()
    with emulator.watch(**options) as findings:
        triton_launch.launch_with_descriptors(triton_kernels.product_of_boxes, (4, 2), [a, b, c], [K])
    assert [finding for finding in findings if MADE_UNSHOWN not in finding] == []
    torch.testing.assert_close(c, (a.double() @ b.double()).bfloat16(), rtol=2**-7, atol=2**-10)
