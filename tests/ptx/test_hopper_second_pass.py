"""NaN and infinity behind a mask, in Hopper's kernels.

A block of threads that finds NaN in a result goes over all of its blocks of rows once more, with what it multiplies by
weights of 0 cleaned.
"""

from __future__ import annotations

import pytest
import test_attention as attention_cases
import torch
from helpers import check

from ptx.test_ops import attention_tensors
from pytransformer import ops

BF16, FP16 = torch.bfloat16, torch.float16


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


@pytest.mark.parametrize(("width", "dtype"), [(64, BF16), (192, FP16)], ids=["64", "192"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_queries_that_see_nothing_never_leak(hopper, poison, width, dtype):
    """Into the gradients of keys: the queries of partial tiles are cleaned."""
    tensors = attention_cases.qkv(1, 2, 1, 150, 300, width, width, dtype=dtype)
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
