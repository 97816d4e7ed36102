"""The library's CUDA kernels under the runner: outputs and gradients against the float64 reference.

The cases are few and small, each there for something that breaks kernels: ragged ends, every kind of mask, dropout,
views, a row wider than a block, each head width that attention is compiled for. The PTX for compute capability 8.0 runs
plain, and with the detectors on two random schedules; that for 9.0, which ``test_architectures.py`` shows to be the
same program, runs plain. ``make test-ptx`` runs everything on both, and the whole tests of the ops over this backend.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import cuda_table
import pytest
import test_attention as attention_cases
import test_attention_decode as decode_cases
import test_attention_varlen as varlen_cases
import test_embedding as embedding_cases
import test_ffn as ffn_cases
import test_layer_norm as layer_norm_cases
import test_linear_cross_entropy as linear_cross_entropy_cases
import torch
from helpers import EMULATED, check, skip_unless_served

from ptx import build
from pytransformer._parity import unwritten_is_nan

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PLAIN: dict[str, Any] = {}
DETECTORS = {"detectors-1": {"races": True, "seed": 1}, "detectors-2": {"races": True, "seed": 2}}
MODES = [(arch, "plain") for arch in build.ARCHS]
MODES += [(arch, mode) for arch in (build.ARCHS if EMULATED else build.ARCHS[:1]) for mode in DETECTORS]


@pytest.fixture(scope="module", params=MODES, ids="-".join)
def emulated(request):
    from ptx import backend

    arch, mode = request.param
    with backend.installed(arch, **DETECTORS.get(mode, PLAIN)) as name, unwritten_is_nan():
        yield name


def dropped(p, **options):
    return {"dropout_p": p, "seed": 1234, **options}


LAYER_NORM = {
    "everything": ((5, 300), BF16, (True,) * 4, dropped(0.3, prenorm=True)),
    "plain": ((3, 7, 64), FP32, (True, True, False, False), {}),
    "ragged": ((70, 3), FP16, (True,) * 4, dropped(0.1)),
    "wide": ((3, 4104), FP32, (True, True, True, False), {"prenorm": True}),
    "widest_float": ((3, 8200), FP32, (True, True, True, False), {"prenorm": True}),
    "three_packs": ((45, 768), BF16, (True,) * 4, dropped(0.1)),
    "two_warps": ((37, 1160), FP16, (True,) * 4, dropped(0.2, prenorm=True)),
    "four_packs": ((19, 1000), BF16, (True,) * 4, {}),
    "six_packs": ((19, 1536), FP32, (True,) * 4, dropped(0.1)),
    "eight_packs": ((19, 1000), FP32, (True,) * 4, dropped(0.1)),
    "odd": ((2, 1023), BF16, (True, False, True, True), {}),
    "many_rows": ((257, 24), FP32, (True,) * 4, {}),
    "bare": ((9, 40), FP16, (False,) * 4, {}),
    "wide_odd": ((2, 4105), FP16, (True, True, True, False), {}),
    "widest": ((2, 8200), BF16, (True,) * 4, dropped(0.1)),
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
    "few_rows": ({"lead": (2100,), "V": 1, "E": 8, "dtype": BF16, "positions": None}, {}),  # summed in parts
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


# B, H, G, T, S, D, Dv; each head width that is compiled has one dtype here.
ATTENTION = {
    "32-one": ((1, 1, 1, 1, 1, 1, 1), "none", FP16, {}),
    "32-window": ((1, 2, 1, 40, 70, 32, 24), "window_left", FP16, {}),
    "64-one_query": ((2, 4, 2, 1, 127, 64, 64), "causal_bottom_right", BF16, {}),
    "64-one_key": ((2, 2, 2, 65, 1, 33, 33), "none", BF16, {}),
    "64-ragged": ((2, 3, 3, 63, 65, 33, 33), "padding", BF16, {}),
    "64-gqa": ((1, 6, 2, 65, 65, 64, 64), "causal", BF16, {}),
    "64-longer_keys": ((1, 2, 2, 33, 150, 64, 33), "bool_full", BF16, {}),
    "64-dropout": ((1, 2, 1, 65, 70, 40, 40), "causal", BF16, dropped(0.3)),
    "64-softcap": ((1, 2, 1, 65, 70, 40, 40), "causal", BF16, {"softcap": 2.0}),
    "96-mqa": ((2, 4, 1, 127, 63, 80, 80), "lengths", FP16, {}),
    "96-longer_queries": ((1, 2, 1, 150, 33, 8, 80), "bias_per_head", FP16, {}),
    "128-causal": ((1, 2, 1, 33, 70, 128, 104), "causal_padding", BF16, dropped(0.1)),
    "192-bias": ((1, 1, 1, 20, 40, 192, 136), "bias_per_key", FP16, {"softcap": 5.0}),
    "256-everything": ((1, 1, 1, 17, 35, 160, 256), "everything", BF16, {}),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(emulated, name):
    skip_unless_served(emulated, "attention")
    judge_attention(emulated, *ATTENTION[name])


def judge_attention(backend, sizes, mask, dtype, options):
    tensors, options = attention_tensors(sizes, mask, dtype, options)
    # Of a softmax over one key all gradients are 0, by cancellation.
    cancelled = dict.fromkeys(("dquery", "dkey", "dvalue"), 16.0) if sizes[4] == 1 else {}
    check("attention", tensors, options, backend, magnitudes=cancelled)


def attention_tensors(sizes, mask, dtype, options):
    B, H, G, T, S, _, _ = sizes
    tensors = attention_cases.qkv(*sizes, dtype=dtype)
    options = attention_cases.MASKS[mask](B, H, T, S) | options | {"enable_gqa": G != H}
    if "bias" in options:
        tensors["bias"] = options.pop("bias").to(dtype)
    return tensors, options


# Few queries over keys enough to be split: the same, with a kernel of its own for each head width.
DECODE = {
    "32": ((1, 2, 1, 3, 520, 24, 32), "bias_per_head", FP16, {}),
    "64": ((1, 4, 2, 1, 600, 64, 64), "causal_bottom_right", BF16, {}),
    "96": ((2, 2, 1, 1, 530, 96, 80), "lengths", FP16, {}),
    "128": ((1, 4, 1, 2, 515, 128, 128), "padding", BF16, {}),
    "192": ((1, 1, 1, 1, 512, 192, 192), "none", FP16, {"softcap": 5.0}),
    "256": ((1, 1, 1, 1, 513, 256, 136), "window_left", BF16, {}),
}


@pytest.mark.parametrize("name", DECODE)
def test_decode(emulated, name):
    skip_unless_served(emulated, "attention")
    judge_attention(emulated, *DECODE[name])


@pytest.mark.parametrize(("name", "dtype"), [("queries_in_a_window", BF16), ("odd_page", FP16)])
def test_attention_in_pages(emulated, name, dtype):
    skip_unless_served(emulated, "attention")
    case = decode_cases.CASES[name]
    decode_cases.check(case, case.tensors(dtype), emulated)


# In dtypes whose kernels of the width are compiled for other cases.
@pytest.mark.parametrize(
    ("name", "dtype"), [("at_the_end", FP16), ("causal", FP16), ("dropped", FP16), ("few_queries", BF16)]
)
def test_attention_end_to_end(emulated, name, dtype):
    skip_unless_served(emulated, "attention")
    case = varlen_cases.CASES[name]
    check("attention_varlen", case.tensors(dtype), case.all_options, emulated)


def test_activation_where_rows_do_not_start_at_16_bytes(emulated):
    """The adapter never hands such a tensor over; the launcher takes it all the same."""
    adapters, module = importlib.import_module(f"{emulated}._arguments"), backend_module()
    x, y = (x.half()[1:].view(1, -1) for x in (torch.randn(68), torch.full((68,), torch.nan)))
    module.ffn_activation_fwd(x, None, "relu", 0.0, y, adapters.call(x))
    assert torch.equal(y, x.relu())


def test_every_kernel_has_run(request):
    """Each kernel of the module, in each form but for the dtype: head widths, rows of any length, aligned or not."""
    if request.config.option.keyword or any("::" in argument for argument in request.config.args):
        pytest.skip("this is a part of the tests")
    module = backend_module()
    names = cuda_table.readable({found[1] for text in module.ptx["80"] for found in build.ENTRY.finditer(text)})
    launched = {form(names[name]) for _, name in module.images if name in names}
    assert {form(name) for name in names.values()} == launched


def form(kernel):
    """``layer_norm_bwd_kernel<8, 16>`` of ``layer_norm_bwd_kernel<bf16, 8, 16>``; 16 bytes are 8 elements, or 4."""
    return re.sub(r"(bf16|fp16|fp32)(, )?", "", kernel.replace("fp32, 4", "fp32, 8"))


def backend_module():
    from ptx import backend

    return backend.module()
