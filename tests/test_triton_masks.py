"""A mask handed to many layers is packed once, and anew when it changes. (Other tests: ``test_attention.py``.)"""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import randn

from pytransformer import backends, masks, ops
from pytransformer.ops import _packed
from pytransformer.ops.attention import UNPACKED

pytestmark = pytest.mark.interpreted
B, H, S, D = 2, 1, 40, 16


@pytest.fixture
def made(monkeypatch):
    """Counts what is made of masks, by the name of the function that makes it."""
    from pytransformer.kernels import _masks

    monkeypatch.setitem(backends.ORDER, "cpu", ("cpu", "triton", "reference"))
    counts = {"pack": 0, "list_tiles": 0}

    def counting(name, make):
        def call(*args):
            counts[name] += 1
            return make(*args)

        return call

    for name in counts:
        monkeypatch.setattr(_masks, name, counting(name, getattr(_masks, name)))
    return counts


def attend(mask, **options):
    torch.manual_seed(1)
    q = randn(B, H, S, D).requires_grad_()
    out = ops.attention(q, q, q, mask, backend="triton", **options)
    return out, *torch.autograd.grad(out.sum(), q)


def test_layers_pack_a_mask_once(made):
    mask = masks.dense(torch.rand(B, 1, S, S) < 0.7)
    for _ in range(3):
        attend(mask)
    assert made == {"pack": 1, "list_tiles": 2}  # by query blocks for forward and dQ, by key blocks for dK and dV


@pytest.mark.parametrize("kind", ["padding", "padding and lengths"])
def test_so_with_a_key_padding_mask_of_a_model(made, kind):
    mask = masks.padding(torch.rand(B, S) < 0.7)
    if "lengths" in kind:
        mask = mask & masks.padding(torch.tensor([S, S - 9]))
    for _ in range(2):
        attend(mask & masks.causal())
    assert made == {"pack": 1, "list_tiles": 2}


def test_bands_and_tiles_of_one_mask_have_lists_of_their_own(made):
    mask = masks.dense(torch.rand(B, 1, S, S) < 0.7)
    whole, causal = attend(mask), attend(mask, is_causal=True)
    assert made == {"pack": 1, "list_tiles": 4}
    torch.testing.assert_close(causal[0], ops.attention(*[_query()] * 3, mask, is_causal=True, backend="reference"))
    assert not torch.equal(whole[0], causal[0])


def test_a_mask_that_was_written_to_is_packed_anew(made):
    keep, lengths = torch.rand(B, S) < 0.7, torch.tensor([S, S - 9])
    mask = masks.padding(keep) & masks.padding(lengths)
    attend(mask)
    keep[:, :20] = True
    found = attend(mask)
    assert made["pack"] == 2
    torch.testing.assert_close(found[0], ops.attention(*[_query()] * 3, mask, backend="reference"))
    lengths[0] = 9
    found = attend(mask)
    assert made["pack"] == 2
    torch.testing.assert_close(found[0], ops.attention(*[_query()] * 3, mask, backend="reference"))


def test_what_was_made_goes_with_the_mask(made):
    keep = torch.rand(B, S) < 0.7
    attend(masks.padding(keep))
    assert keep in _packed._kept
    before = len(_packed._kept)
    del keep
    gc.collect()
    assert len(_packed._kept) < before


def test_nothing_is_remembered_where_no_version_tells_of_a_change(made):
    with torch.inference_mode():
        keep = torch.rand(B, S) < 0.7
        for fill in (False, True):
            keep[:, 0] = fill
            found = ops.attention(*[_query()] * 3, masks.padding(keep), backend="triton")
            torch.testing.assert_close(found, ops.attention(*[_query()] * 3, masks.padding(keep), backend="reference"))
    assert made["pack"] == 2


def test_compiled_code_packs_for_itself(made):
    """Its buffers are written to behind the version counter's back."""
    mask = torch.rand(B, 1, S, S) < 0.7
    q = _query()
    args = (q, q, q, mask, None, None, None, None, None, 0.25, 0.0, 0.0, None, *UNPACKED, "triton")
    for _ in range(2):
        torch.ops.pytransformer.attention_fwd(*args)
    assert made["pack"] == 2


def _query():
    torch.manual_seed(1)
    return randn(B, H, S, D)


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 64)])
def test_tiles_of_less_than_a_word_of_bits(made, monkeypatch, tile):
    """Half a word may be full where the other is empty."""
    from pytransformer.kernels import _configs

    monkeypatch.setattr(_configs, "_INTERPRETED_TILE", _configs.Config(tile, 4))
    keep = torch.rand(B, 1, S, S) < 0.5
    keep[..., :16] = True
    keep[:, :, 16:, 16:32] = False
    found = attend(masks.dense(keep))
    q = _query().requires_grad_()
    wanted = ops.attention(q, q, q, keep, backend="reference")
    torch.testing.assert_close(found, (wanted, *torch.autograd.grad(wanted.sum(), q)))
