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


def unpacked(bits):
    """The bools of packed words, [.., rows, 32 * words]."""
    return (bits.words[..., None] >> torch.arange(32) & 1).flatten(-2).bool()


@pytest.mark.parametrize("by_octets", [True, False])
@pytest.mark.parametrize(("T", "S"), [(1, 40), (37, 40), (70, 264), (300, 8)])
def test_packing(T, S, by_octets):
    """Eight bytes at a time where a row allows it, whatever a byte that is not 0 holds; and by keys."""
    from pytransformer.kernels import _masks

    room = torch.randint(0, 256, (2, 3, T, S + 8), dtype=torch.uint8) * (torch.rand(2, 3, T, S + 8) < 0.5)
    start = 8 if by_octets else 1
    mask = room.view(torch.bool)[..., start : start + S]
    assert (_masks._octets(mask).dtype == torch.int64) == by_octets
    bits = _masks.pack(mask)
    wanted = room[..., start : start + S] != 0
    found = unpacked(bits)
    assert torch.equal(found[..., :S], wanted)
    assert not found[..., S:].any()
    transposed = _masks.by_keys(bits)
    found = unpacked(transposed)
    if T == 1:
        assert transposed.stride_word == 0
        assert torch.equal(found, wanted.mT.expand(-1, -1, -1, 32))
    else:
        assert torch.equal(found[..., :T], wanted.mT)
        assert not found[..., T:].any()


def states_of(keep, block_t, block_s, band, lengths):
    """[B,H,query blocks,key blocks]: 0 for a tile that nobody sees, 2 for one that all see, 1 for others."""
    T, S = keep.shape[2:]
    t, s = torch.arange(T)[:, None], torch.arange(S)
    keep = keep & (s - t >= band[0]) & (s - t <= band[1]) & (s < lengths[:, None, None, None])
    rows = [keep[:, :, i : i + block_t] for i in range(0, T, block_t)]
    tiles = [[row[..., j : j + block_s].flatten(2) for j in range(0, S, block_s)] for row in rows]
    beyond = S % block_s > 0  # the last key block is never full
    full = [[x.all(-1) & (not beyond or j < len(row) - 1) for j, x in enumerate(row)] for row in tiles]
    some = [[x.any(-1) for x in row] for row in tiles]
    stacked = [torch.stack([torch.stack(row, -1) for row in x], -2).int() for x in (full, some)]
    return stacked[0] + stacked[1]


@pytest.mark.parametrize("group", [None, 1, 2])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (64, 32)])
@pytest.mark.parametrize("band", [(-(2**30), 2**30), (-100, 0)])
def test_lists_of_tiles(group, heads, tile, band):
    from pytransformer.kernels import _masks

    T, S = 150, 170
    keep = torch.rand(2, heads, T, S) < 0.9
    keep[:, :, 32:96, :64] = True
    keep[:, :, :16, 16:96] = False
    lengths = torch.tensor([S, 100])
    states = states_of(keep.expand(2, 4, T, S), *tile, band, lengths)
    found = _masks.list_tiles(_masks.pack(keep), lengths, *band, *tile, group)
    if group is None:
        wanted = states[:, :heads]
    else:  # of each key block the blocks of queries, those of the group's heads beside each other
        grouped = states.unflatten(1, (-1, group))[:, : max(heads // group, 1)]
        wanted = grouped.permute(0, 1, 4, 3, 2).flatten(3)
    n = wanted.shape[3]
    assert found.rows.shape == (*wanted.shape[:3], 2 + n)
    for row, tiles in zip(found.rows.flatten(0, 2), wanted.flatten(0, 2), strict=True):
        n_full, n_partial = row[:2].tolist()
        assert row[2 : 2 + n_full].tolist() == (tiles == 2).nonzero().flatten().tolist()
        assert row[2 + n - n_partial :].tolist() == (tiles == 1).nonzero().flatten().flip(0).tolist()


def test_compiled_code_packs_for_itself(made):
    """Its buffers are written to behind the version counter's back."""
    mask = torch.rand(B, 1, S, S) < 0.7
    q = _query()
    args = (q, q, q, mask, None, None, None, None, None, 0.25, 0.0, 0.0, None, *UNPACKED, "triton")
    for _ in range(2):
        torch.ops.pytransformer.attention_fwd(*args)
    assert made["pack"] == 2


@pytest.mark.parametrize("l2", [0, 40_000, 10**9])
def test_every_block_has_a_program_however_many_rows_share_the_cache(made, monkeypatch, l2):
    from pytransformer.kernels import _configs

    monkeypatch.setattr(_configs, "l2_bytes", lambda device: l2)  # rows of 16,000 bytes: one, two of five, or all
    q, k = randn(1, 10, 250, 16), randn(1, 5, 250, 16)
    results = []
    for backend in ("triton", "reference"):
        inputs = [x.clone().requires_grad_() for x in (q, k, k)]
        out = ops.attention(*inputs, is_causal=True, enable_gqa=True, backend=backend)
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


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
