"""The library's CUDA kernels under the runner: outputs and gradients against the float64 reference.

The cases are few and small, each there for something that breaks kernels: ragged ends, every kind of mask, dropout,
views, a row wider than a block. All run on the PTX for compute capability 8.0, plain, and again with the detectors on a
random schedule; a part of them on that for 9.0. ``make test-ptx`` runs all of them on both, and the whole tests of the
ops over this backend.
"""

from __future__ import annotations

import pytest
import test_attention as attention_cases
import test_attention_decode as decode_cases
import test_embedding as embedding_cases
import test_ffn as ffn_cases
import test_layer_norm as layer_norm_cases
import test_linear_cross_entropy as linear_cross_entropy_cases
import torch
from helpers import check, skip_unless_served

from ptx import build
from pytransformer._parity import unwritten_is_nan

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MODES = {
    "plain": {},
    "detectors": {"races": True, "seed": 1},
}


@pytest.fixture(scope="module", params=[(arch, mode) for mode in MODES for arch in build.ARCHS], ids="-".join)
def emulated(request):
    from ptx import backend

    arch, mode = request.param
    with backend.installed(arch, **MODES[mode]) as name, unwritten_is_nan():
        yield name


def dropped(p, **options):
    return {"dropout_p": p, "seed": 1234, **options}


LAYER_NORM = {
    "everything": ((5, 300), BF16, (True,) * 4, dropped(0.3, prenorm=True)),
    "plain": ((3, 7, 64), FP32, (True, True, False, False), {}),
    "ragged": ((70, 3), FP16, (True,) * 4, dropped(0.1)),
    "wide": ((3, 4104), FP32, (True, True, True, False), {"prenorm": True}),
    "odd": ((2, 1023), BF16, (True, False, True, True), {}),
    "many_rows": ((257, 24), FP32, (True,) * 4, {}),
    "bare": ((9, 40), FP16, (False,) * 4, {}),
}


@pytest.mark.parametrize("name", LAYER_NORM)
def test_layer_norm_and_rms_norm(emulated, name):
    skip_unless_served(emulated, "layer_norm")
    shape, dtype, flags, options = LAYER_NORM[name]
    tensors = layer_norm_cases.make(shape, dtype, flags)
    check("layer_norm", tensors, options, emulated)
    del tensors["bias"]
    check("rms_norm", tensors, options, emulated)


EMBEDDING = {
    "positions": ({"dtype": BF16}, {}),
    "wide": ({"lead": (3, 5), "E": 520, "dtype": FP32, "positions": (5, 520), "segments": False}, dropped(0.2)),
    "alone": ({"lead": (50,), "V": 3, "dtype": FP16, "positions": None}, {"scale": 2.0}),
}


@pytest.mark.parametrize("name", EMBEDDING)
def test_embedding(emulated, name):
    skip_unless_served(emulated, "embedding")
    sizes, options = EMBEDDING[name]
    check("embedding", embedding_cases.make(**sizes), options, emulated)


FFN = {
    "relu": (((33,), 24, 40, 24), BF16, {"activation": "relu"}),
    "gelu": (((2, 17), 32, 127, 9), FP16, {"activation": "gelu"}),
    "silu_dropout": (((65,), 16, 64, 16), FP32, dropped(0.3, activation="silu")),
}


@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("name", FFN)
def test_ffn(emulated, name, gated):
    skip_unless_served(emulated, "ffn")
    sizes, dtype, options = FFN[name]
    check("ffn", ffn_cases.make(*sizes, dtype=dtype, gated=gated), options, emulated)


CROSS_ENTROPY = {
    "mean": ({"dtype": BF16}, {}),
    "smoothed": ({"lead": (21,), "V": 1003, "dtype": FP32}, {"label_smoothing": 0.1, "z_loss": 1e-3}),
    "capped": ({"lead": (3, 3), "V": 130, "dtype": FP16, "bias": False}, {"softcap": 3.0, "reduction": "none"}),
}


@pytest.mark.parametrize("name", CROSS_ENTROPY)
def test_linear_cross_entropy(emulated, name):
    skip_unless_served(emulated, "linear_cross_entropy")
    sizes, options = CROSS_ENTROPY[name]
    check("linear_cross_entropy", linear_cross_entropy_cases.make(**sizes), options, emulated)


ATTENTION = {
    "one": ("none", BF16),
    "one_query": ("causal_bottom_right", FP16),
    "one_key": ("none", BF16),
    "ragged": ("padding", BF16),
    "gqa": ("causal", BF16),
    "mqa": ("lengths", FP16),
    "longer_keys": ("bool_full", BF16),
    "longer_queries": ("bias_per_head", BF16),
    "wide_heads": ("everything", FP16),
}


@pytest.mark.parametrize("shape", ATTENTION)
def test_attention(emulated, shape):
    skip_unless_served(emulated, "attention")
    mask, dtype = ATTENTION[shape]
    tensors, options = attention_cases.case(shape, mask, dtype)
    check("attention", tensors, options, emulated, magnitudes=attention_cases.cancelled(shape, mask))


@pytest.mark.parametrize("options", [{"dropout_p": 0.3}, {"softcap": 2.0}], ids=str)
def test_attention_dropout_and_softcap(emulated, options):
    skip_unless_served(emulated, "attention")
    tensors = attention_cases.qkv(1, 2, 1, 65, 70, 40, 40, BF16)
    check("attention", tensors, {**options, "seed": 7, "is_causal": True, "enable_gqa": True}, emulated)


@pytest.mark.parametrize(("name", "dtype"), [("queries_in_a_window", BF16), ("odd_page", FP16)])
def test_attention_in_pages(emulated, name, dtype):
    skip_unless_served(emulated, "attention")
    case = decode_cases.CASES[name]
    decode_cases.check(case, case.tensors(dtype), emulated)
