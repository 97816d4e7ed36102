"""Attention by Hopper's own instructions (``csrc/cuda/attention_hopper.cuh``) under the detectors; and on such a GPU.

A block of threads there takes one block of rows after the other and has four roles that hand tiles on through barriers
in shared memory, so what matters is more blocks of rows than multiprocessors (the runner has eight, an H200 132), tiles
enough to go around the stages, and sequences and masks by which a role finds nothing to do.
"""

from __future__ import annotations

import pytest
import test_attention as attention_cases
import test_attention_varlen as varlen_cases
import torch
from helpers import ON_GPU, check

from ptx import build
from ptx.test_ops import attention_tensors, dropped
from pytransformer import ops
from pytransformer._parity import unwritten_is_nan

BF16, FP16 = torch.bfloat16, torch.float16
ON_HOPPER = "cuda" in ON_GPU and torch.cuda.get_device_capability() == (9, 0)


@pytest.fixture(params=["detectors-1", "detectors-2", *(["gpu"] if ON_HOPPER else [])])
def hopper(request):
    """The name of a backend."""
    if request.param == "gpu":
        with torch.device("cuda"), unwritten_is_nan():
            yield "cuda"
        return
    if build.unavailable() is not None:
        pytest.skip(build.unavailable())
    from ptx import backend

    with backend.installed("90a", races=True, seed=int(request.param[-1])) as name, unwritten_is_nan():
        yield name


# B, H, G, T, S, D, Dv
CASES = {
    "64-one_query": ((2, 4, 2, 1, 127, 64, 64), "causal_bottom_right", BF16, {}),
    "64-many_blocks": ((2, 3, 3, 290, 140, 64, 64), "causal", BF16, {}),
    "64-long": ((1, 2, 1, 70, 700, 48, 64), "none", FP16, {}),
    "64-everything": ((2, 4, 2, 140, 300, 64, 40), "everything", FP16, {}),
    "128-mask": ((1, 2, 1, 140, 300, 128, 128), "bool_full", FP16, {}),
    "128-dropout": ((1, 2, 2, 130, 270, 128, 104), "window_left", BF16, dropped(0.2)),
    "128-lengths": ((3, 4, 4, 150, 160, 80, 128), "lengths", BF16, {}),
    "192-bias": ((1, 2, 1, 70, 150, 192, 136), "bias_per_head", FP16, {"softcap": 5.0}),
    "192-capped": ((2, 4, 2, 70, 90, 136, 160), "bool_full", FP16, {"softcap": 3.0}),
    "256-padding": ((1, 2, 1, 140, 200, 256, 256), "causal_padding", BF16, {}),
    "256-many_blocks": ((3, 3, 3, 100, 200, 200, 256), "window_left", FP16, dropped(0.2)),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(hopper, name):
    (B, *sizes), *rest = CASES[name]
    if hopper == "cuda" and "blocks" in name:
        B *= 32
    tensors, options = attention_tensors((B, *sizes), *rest)
    check("attention", tensors, options, hopper)


@pytest.mark.parametrize("width", [64, 160])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, **varlen_cases.FROM_THE_END}], ids=["", "at_the_end"])
def test_end_to_end(hopper, options, width):
    case = varlen_cases.Case((5, 0, 170, 1, 140), (170, 3, 170, 140, 0), 2, 1, width, 48, options)
    check("attention_varlen", case.tensors(BF16), case.all_options, hopper)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("mask", ["lengths", "padding", "causal"])
def test_what_nobody_sees_never_leaks(hopper, mask, poison):
    """A weight of 0 does not hide it: the second pass, with values or keys cleaned, runs for all blocks."""
    sizes = B, H, G, T, S, _, _ = 2, 3, 3, 200, 270, 64, 64
    tensors, options = attention_tensors(sizes, mask, BF16, {})
    unseen = ~attention_cases.visible(B, 1, T, S, options).any(2)
    assert unseen.any()
    hidden, harmless = (
        tensors | {name: torch.where(unseen[..., None], x, tensors[name]) for name in ("key", "value")}
        for x in (poison, 0)
    )
    check("attention", hidden, options, hopper, harmless=harmless)


@pytest.mark.parametrize("width", [64, 192])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_queries_that_see_nothing_never_leak(hopper, poison, width):
    """Into the gradients of keys: the queries of partial tiles are cleaned."""
    tensors = attention_cases.qkv(1, 3, 1, 150, 300, width, width, dtype=BF16)
    options = {"attn_mask": torch.rand(1, 1, 150, 300) < 0.5, "enable_gqa": True}
    options["attn_mask"][:, :, 40:50] = False
    hidden, harmless = (tensors | {"query": tensors["query"].clone()} for _ in range(2))
    hidden["query"][:, :, 40:50], harmless["query"][:, :, 40:50] = poison, 0
    check("attention", hidden, options, hopper, harmless=harmless)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_a_value_reaches_the_queries_that_see_it_only(hopper, poison):
    tensors = attention_cases.qkv(1, 2, 2, 300, 300, 64, 64, dtype=BF16)
    clean = ops.attention(**tensors, is_causal=True, backend=hopper)
    tensors["value"][:, :, 137] = poison
    out = ops.attention(**tensors, is_causal=True, backend=hopper)
    torch.testing.assert_close(out[:, :, :137], clean[:, :, :137], rtol=0, atol=0)
    assert not out[:, :, 137:].isfinite().any()
