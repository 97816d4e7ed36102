"""attention_varlen and attention_decode: each sequence by itself is what they must give."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_rejects, randn

from pytransformer import ops

LENGTHS_Q, LENGTHS_K = (5, 0, 33, 1), (7, 3, 20, 64)
OPTIONS = [
    {},
    {"is_causal": True},
    {"is_causal": True, "causal_align": "bottom_right"},
    {"window": (6, 2)},
    {"window": (6, 0), "causal_align": "bottom_right", "softcap": 5.0},
    {"is_causal": True, "window": 3, "causal_align": "bottom_right", "scale": 0.4},
]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_varlen_is_attention_of_each_sequence(options, backend):
    q, k, v = randn(sum(LENGTHS_Q), 4, 16), randn(sum(LENGTHS_K), 2, 16), randn(sum(LENGTHS_K), 2, 24)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu_q, cu_k = offsets(LENGTHS_Q), offsets(LENGTHS_K)
    out = ops.attention_varlen(*leaves, cu_q, cu_k, 40, enable_gqa=True, backend=backend, **options)
    wanted = []
    for i in range(len(LENGTHS_Q)):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        one = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        wanted.append(ops.attention(*one, enable_gqa=True, backend="reference", **options)[0].transpose(0, 1))
    wanted = torch.cat(wanted)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(out)
    for found, expected in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(wanted, leaves, grad), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_varlen_lse_and_its_shape():
    q = randn(9, 2, 8)
    out, lse = ops.attention_varlen(q, q, q, torch.tensor([0, 4, 9], dtype=torch.int32), return_lse=True)
    _, wanted = ops.attention(*(q[4:].transpose(0, 1)[None],) * 3, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (2, 9)
    torch.testing.assert_close(lse[:, 4:], wanted[0])


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("paged", [False, True])
def test_decode_is_the_end_of_attention(T, window, paged):
    B, H, G, S, D, page = 3, 4, 2, 32, 16, 8
    lengths = torch.tensor([T, 17, 32])
    q, k, v = randn(B, H, T, D), randn(B, G, S, D), randn(B, G, S, D)
    caches, options = (k, v), {}
    if paged:
        table = torch.randperm(B * S // page).view(B, -1)
        pools = [torch.empty(B * S // page, page, G, D) for _ in range(2)]
        for pool, x in zip(pools, (k, v), strict=True):
            pool[table] = x.transpose(1, 2).unflatten(1, (-1, page))
        caches, options = pools, {"block_table": table}
    out, lse = ops.attention_decode(q, *caches, lengths, window=window, return_lse=True, **options)
    for b in range(B):
        one = (q[b : b + 1], k[b : b + 1, :, : lengths[b]], v[b : b + 1, :, : lengths[b]])
        same = {"is_causal": True, "causal_align": "bottom_right", "window": window, "enable_gqa": True}
        wanted, wanted_lse = ops.attention(*one, **same, return_lse=True, backend="reference")
        torch.testing.assert_close(out[b : b + 1], wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[b : b + 1], wanted_lse, rtol=1e-4, atol=1e-5)


Q, CU = torch.ones(6, 2, 4), torch.tensor([0, 2, 6])
CACHE, ONE = torch.ones(2, 2, 8, 4), torch.ones(2, 2, 1, 4)
BAD_VARLEN = [
    ({"query": torch.ones(2, 4)}, ValueError, "query must be [T,H,D], got float32 [2, 4]"),
    ({"cu_seq_q": CU.float()}, TypeError, "cu_seq_q must be integer [N+1], got float32 [3]"),
    ({"cu_seq_q": torch.tensor([0, 7, 6])}, ValueError, "cu_seq_q must rise from 0 to 6, got [0, 7, 6]"),
    ({"cu_seq_k": torch.tensor([0, 6])}, ValueError, "cu_seq_k must be of as many sequences as cu_seq_q, 2; got 1"),
    ({"max_q": 3}, ValueError, "max_q must be at least the longest sequence, 4; got 3"),
    (
        {"window": -1, "causal_align": "bottom_right"},
        ValueError,
        "window must be a non-negative integer, a pair of them or None, got -1",
    ),
    ({"value": torch.ones(5, 2, 4)}, ValueError, "value must be [Tk,G,Dv] = [6, 2, 4], got float32 [5, 2, 4]"),
]
BAD_DECODE = [
    ({"cache_lengths": torch.tensor([0, 3])}, ValueError, "between T = 1 and S = 8, got [0, 3]"),
    ({"cache_lengths": torch.tensor([3])}, TypeError, "cache_lengths must be integer [2], got int64 [1]"),
    ({"key_cache": CACHE[:1]}, ValueError, "key_cache must be [B,G,S,D] with B = 2, got float32 [1, 2, 8, 4]"),
    ({"key_cache": CACHE[:, :, 0]}, ValueError, "key_cache must be [B,G,S,D] with B = 2, got float32 [2, 2, 4]"),
    ({"window": -1}, ValueError, "window must be a non-negative integer or None, got -1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_VARLEN, ids=[m[:40] for *_, m in BAD_VARLEN])
def test_bad_input_of_varlen(change, error, message):
    assert_rejects(ops.attention_varlen, {"query": Q, "key": Q, "value": Q, "cu_seq_q": CU} | change, error, message)


@pytest.mark.parametrize(("change", "error", "message"), BAD_DECODE, ids=[m[:40] for *_, m in BAD_DECODE])
def test_bad_input_of_decode(change, error, message):
    good = {"query": ONE, "key_cache": CACHE, "value_cache": CACHE, "cache_lengths": torch.tensor([8, 3])}
    assert_rejects(ops.attention_decode, good | change, error, message)
