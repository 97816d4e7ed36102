"""Attention by Hopper's own instructions (``csrc/cuda/attention_hopper.cuh``) under the detectors; and on such a GPU.

A block of threads there takes one block of rows after the other and has four roles that hand tiles on through barriers
in shared memory, so what matters is more blocks of rows than multiprocessors (the runner has eight, an H200 132), tiles
enough to go around the stages, and sequences and masks by which a role finds nothing to do. What they do about NaN
behind a mask is in ``test_hopper_second_pass.py``.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import test_attention as attention_cases
import test_attention_varlen as varlen_cases
import torch
from helpers import check

from ptx.test_ops import attention_tensors, dropped
from pytransformer import ops

BF16, FP16 = torch.bfloat16, torch.float16

# B, H, G, T, S, D, Dv
CASES = {
    "64-one_query": ((2, 4, 2, 1, 127, 64, 64), "causal_bottom_right", BF16, {}),
    "64-many_blocks": ((2, 3, 3, 290, 140, 64, 64), "causal", BF16, {}),
    "64-long": ((1, 2, 1, 70, 700, 48, 64), "none", FP16, {}),
    "64-everything": ((2, 4, 2, 140, 300, 64, 40), "everything", FP16, {}),
    "128-mask": ((1, 2, 1, 140, 300, 128, 128), "bool_full", FP16, {}),
    "128-dropout": ((1, 2, 2, 130, 270, 128, 104), "window_left", BF16, dropped(0.2)),
    "128-lengths": ((3, 2, 2, 150, 160, 80, 128), "lengths", BF16, {}),
    "192-bias": ((1, 2, 1, 70, 150, 192, 136), "bias_per_head", FP16, {"softcap": 5.0}),
    "192-capped": ((1, 4, 2, 70, 90, 136, 160), "bool_full", FP16, {"softcap": 3.0}),
    "256-padding": ((1, 2, 1, 140, 200, 256, 256), "causal_padding", BF16, {}),
    "256-many_blocks": ((1, 3, 3, 70, 200, 200, 256), "window_left", BF16, dropped(0.2)),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(hopper, name):
    (B, *sizes), *rest = CASES[name]
    if hopper == "cuda" and "blocks" in name:
        B *= 32
    tensors, options = attention_tensors((B, *sizes), *rest)
    check("attention", tensors, options, hopper)


@pytest.mark.parametrize(("width", "dtype"), [(64, BF16), (160, FP16)], ids=["64", "160"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, **varlen_cases.FROM_THE_END}], ids=["", "at_the_end"])
def test_end_to_end(hopper, options, width, dtype):
    case = varlen_cases.Case((5, 0, 170, 1, 140), (170, 3, 170, 140, 0), 2, 1, width, 48, options)
    check("attention_varlen", case.tensors(dtype), case.all_options, hopper)


def test_a_thread_that_has_called_nothing_of_cuda(hopper):
    """Tensor maps are made by the driver, which wants a context bound to the thread."""
    tensors = attention_cases.qkv(1, 1, 1, 64, 130, 64, 64, dtype=BF16)
    wanted = ops.attention(**tensors, backend=hopper)
    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(ops.attention, **tensors, backend=hopper).result()
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("names", "length", "stride"),
    [(("query",), 1, 1), (("key", "value"), 1, 1), (("query", "key", "value"), 150, 8)],
    ids=["one query", "one key", "overlapping rows"],
)
def test_strides_of_which_no_map_can_tell(hopper, names, length, stride):
    """The stride of a dimension of one entry says nothing, and may be any."""
    tensors = attention_cases.qkv(1, 1, 1, 150, 150, 64, 64, dtype=BF16)
    for name in names:
        memory = torch.randn(64 + stride * length).to(BF16)
        tensors[name] = memory.as_strided((1, 1, length, 64), (stride, stride, stride, 1))
    contiguous = {name: x.contiguous() for name, x in tensors.items()}
    out, wanted = (ops.attention(**given, backend=hopper) for given in (tensors, contiguous))
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
