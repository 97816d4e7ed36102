"""The mask algebra."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytransformer import masks
from pytransformer.reference.attention import visible_keys


def visible(mask, T, S, B=2):
    query, key = torch.empty(B, 1, T, 1), torch.empty(B, 1, S, 1)
    lower, upper = mask.band(T, S)
    found = visible_keys(query, key, mask.keep, mask.key_lengths, lower, upper)
    return (torch.ones(1, dtype=torch.bool) if found is None else found).expand(B, 1, T, S)


sizes = st.integers(1, 9)
sides = st.none() | st.integers(0, 9)


@settings(max_examples=100, deadline=None)
@given(sizes, sizes, st.booleans(), sides, sides, st.sampled_from(masks.ALIGNMENTS))
def test_bands(T, S, causal, left, right, align):
    mask = masks.Mask(causal=causal, left=left, right=right, align=align)
    offset = S - T if align == "bottom_right" else 0
    for t in range(T):
        for s in range(S):
            p = t + offset
            wanted = (not causal or s <= p) and (left is None or s >= p - left) and (right is None or s <= p + right)
            assert bool(visible(mask, T, S)[0, 0, t, s]) == wanted, (t, s)


def parts():
    generator = torch.Generator().manual_seed(0)
    return {
        "causal": masks.causal(),
        "window": masks.window(2, 1),
        "left": masks.window(3, None),
        "lengths": masks.padding(torch.tensor([3, 5])),
        "padding": masks.padding(torch.rand(2, 6, generator=generator) < 0.5),
        "dense": masks.dense(torch.rand(5, 6, generator=generator) < 0.5),
    }


@pytest.mark.parametrize("first", parts())
@pytest.mark.parametrize("second", parts())
def test_and_is_the_conjunction(first, second):
    a, b = parts()[first], parts()[second]
    assert torch.equal(visible(a & b, 5, 6), visible(a, 5, 6) & visible(b, 5, 6))


def test_three_compose_and_keep_their_alignment():
    a, b, c = masks.causal("bottom_right"), masks.padding(torch.tensor([3, 6])), masks.window(2)
    mask = a & b & c
    assert mask.align == "bottom_right"
    assert mask.aligned("top_left").align == "bottom_right"
    assert masks.causal().aligned("top_left").align == "top_left"


def test_analytic_masks_stay_analytic():
    mask = masks.causal() & masks.window(4) & masks.padding(torch.tensor([3, 6]))
    assert mask.keep is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.causal("left"), "masks: align must be 'top_left', 'bottom_right' or None, got 'left'"),
        (lambda: masks.window(-1), "masks.window: left must be a non-negative integer, got -1"),
        (lambda: masks.window(True), "masks.window: left must be a non-negative integer, got True"),
        (lambda: masks.window(1, 2.5), "masks.window: right must be a non-negative integer, got 2.5"),
        (lambda: masks.padding(torch.ones(2, 3)), "or integer lengths [B], got torch.float32 [2, 3]"),
        (lambda: masks.padding([1, 2]), "or integer lengths [B], got [1, 2]"),
        (lambda: masks.dense(torch.ones(2, 3)), "masks.dense: wants a bool tensor (True = attend), got torch.float32"),
        (
            lambda: masks.causal("top_left") & masks.window(1, align="bottom_right"),
            "masks: cannot combine alignments 'top_left' and 'bottom_right'",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_and_with_something_else():
    with pytest.raises(TypeError):
        masks.causal() & torch.ones(2, 2).bool()
