"""attention_decode, over a cache in pages above all: each sequence by itself, in one piece, is what it must give.

Whatever no query sees is poisoned: the rest of the pool with NaN, the rest of the table with numbers of no page.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import compare
import pytest
import torch
from helpers import DTYPES, EMULATED, assert_rejects, randn

import pytransformer
from pytransformer import backends, ops
from pytransformer._parity import alike

GARBAGE = (-1, 2**31 - 1, -(2**31), 10**6)
needs_cpu = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu")))


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    H: int
    G: int
    T: int
    D: int
    Dv: int
    page: int
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        B, S = len(self.lengths), max(self.lengths)
        q, k = randn(B, self.H, self.T, self.D, dtype=dtype), randn(B, self.G, S, self.D, dtype=dtype)
        return {"query": q, "key": k, "value": randn(B, self.G, S, self.Dv, dtype=dtype)}

    def seen(self, b: int) -> range:
        """The keys that some query of a sequence sees."""
        window = self.options.get("window")
        return range(0 if window is None else max(0, self.lengths[b] - self.T - window), self.lengths[b])

    def table(self) -> tuple[torch.Tensor, int]:
        """A table of pages in random order, and how many pages there are."""
        P = -(-max(self.lengths) // self.page) + 2
        pages = len(self.lengths) * P
        table = torch.tensor(GARBAGE)[torch.randint(len(GARBAGE), (len(self.lengths), P))].int()
        order = iter(torch.randperm(pages).tolist())
        for b in range(len(self.lengths)):
            for p in {s // self.page for s in self.seen(b)}:
                table[b, p] = next(order)
        return table, pages

    def pool(self, x: torch.Tensor, table: torch.Tensor, pages: int) -> torch.Tensor:
        """[B,G,S,D] in pages."""
        pool = torch.full((pages, self.page, x.shape[1], x.shape[3]), torch.nan, dtype=x.dtype)
        for b in range(len(self.lengths)):
            for s in self.seen(b):
                pool[table[b, s // self.page], s % self.page] = x[b, :, s]
        return pool

    def paged(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensor arguments of ``attention_decode``."""
        table, pages = self.table()
        pools = {f"{name}_cache": self.pool(tensors[name], table, pages) for name in ("key", "value")}
        lengths = torch.tensor(self.lengths)
        return {"query": tensors["query"], **pools, "cache_lengths": lengths, "block_table": table}

    def apart(self, function: Any, tensors: dict[str, torch.Tensor], **more: Any) -> tuple[torch.Tensor, ...]:
        """What ``function``, an attention, makes of the sequences one by one."""
        options = {"is_causal": True, "causal_align": "bottom_right", "enable_gqa": True, **self.options, **more}
        found = []
        for b, length in enumerate(self.lengths):
            one = tensors["query"][b : b + 1], *(tensors[n][b : b + 1, :, :length] for n in ("key", "value"))
            y = function(*one, **options)
            found.append(y if isinstance(y, tuple) else (y,))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


CASES = {
    "one_query": Case((1, 40, 96), 4, 2, 1, 24, 40, 16),
    "window": Case((33, 96, 7), 4, 2, 1, 32, 32, 16, {"window": 5}),
    "eight_queries": Case((8, 50, 64), 4, 1, 8, 16, 24, 16),
    "queries_in_a_window": Case((4, 61, 30), 2, 2, 3, 64, 64, 8, {"window": 9, "softcap": 3.0}),
    "page_of_one": Case((3, 20), 2, 1, 1, 33, 17, 1),
    "odd_page": Case((5, 43), 4, 2, 2, 40, 40, 7, {"scale": 0.4}),
    "large_page": Case((5, 300), 2, 1, 1, 80, 80, 256),
    "long": Case((1100, 37), 2, 1, 3, 24, 40, 16),
    "long_of_odd_pages": Case((1100,), 2, 1, 2, 16, 16, 7),
    "long_window": Case((1100, 600), 2, 1, 1, 16, 16, 16, {"window": 100}),
    "most_queries": Case((70, 64), 8, 1, 8, 128, 128, 32, {"softcap": 20.0}),
}


def wide(tensors):
    return {name: x.double() for name, x in tensors.items()}


def plain_with_lse(query, key, value, *, scale=None, softcap=None, window=None, **same):
    """``(out, lse)`` in plain PyTorch, in the dtype of the inputs."""
    options = {"scale": scale, "softcap": softcap, "window": window, **same}
    out = compare.plain.attention(query, key, value, **options)
    T, S, shared = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(shared, 1).mT * (query.shape[3] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    back = torch.arange(S - T, S)[:, None] - torch.arange(S)
    hidden = (back < 0) | (back > (S if window is None else window))
    return out, scores.masked_fill(hidden, -torch.inf).logsumexp(-1)


def against_the_oracle(case, tensors, found=None):
    """``(out, lse)``, or plain PyTorch's themselves."""
    expected = case.apart(ops.attention, wide(tensors), return_lse=True, backend="reference")
    plain = case.apart(plain_with_lse, tensors)
    return [compare.compare(*parts) for parts in zip(("output", "lse"), found or plain, expected, plain, strict=True)]


def decode(case, tensors, backend):
    return ops.attention_decode(**case.paged(tensors), **case.options, return_lse=True, backend=backend)


def check(case, tensors, backend):
    """One call, judged; where plain PyTorch's error decides, as in ``helpers.check``, it is taken of more inputs."""
    found = against_the_oracle(case, tensors, decode(case, tensors, backend))
    assert all(c.mismatch is None for c in found), list(map(str, found))
    if not all(c.ok for c in found):
        others = list(zip(*(against_the_oracle(case, other) for other in alike(tensors)), strict=True))
        for c, more in zip(found, others, strict=True):
            assert c.max_error <= max(c.max_allowed, *(o.max_allowed for o in more)), str(c)
            assert c.rms_error <= max(c.rms_allowed, *(o.rms_allowed for o in more)), str(c)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_pages(backend_isa, name, dtype):
    check(CASES[name], CASES[name].tensors(dtype), backend_isa)


def layouts(pools, table):
    """The same pools and table with other strides."""
    key, value = pools
    both = torch.full((*key.shape[:2], 2, *key.shape[2:]), torch.nan, dtype=key.dtype)
    both[:, :, 0], both[:, :, 1] = key, value
    wider = torch.full((table.shape[0], table.shape[1] + 3), -7, dtype=torch.int32)
    wider[:, 1:-2] = table
    yield "packed", both[:, :, 0], both[:, :, 1], wider[:, 1:-2]
    yield "heads_first", *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in pools), table.mT.contiguous().mT
    yield "int64", key, value, table.long()
    yield "dims_first", *(x.mT.contiguous().mT for x in pools), table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_of_pools_and_tables(backend_isa, dtype):
    case = Case((5, 70), 4, 2, 2, 32, 32, 16)
    arguments = case.paged(case.tensors(dtype))
    if EMULATED and dtype == torch.float32:
        pytest.skip("the CUDA kernels take 16 bits")
    wanted = ops.attention_decode(**arguments, backend=backend_isa)
    assert wanted.isfinite().all()
    pools = arguments["key_cache"], arguments["value_cache"]
    for kind, key, value, table in layouts(pools, arguments["block_table"]):
        changed = {"key_cache": key, "value_cache": value, "block_table": table}
        found = ops.attention_decode(**arguments | changed, backend=backend_isa)
        assert torch.equal(found, wanted), kind


def test_poison_that_a_query_sees_reaches_it(backend_isa):
    """NaN in a key or a value of one sequence: of the queries those that see it, and no other sequence."""
    case = Case((30, 30), 2, 1, 3, 16, 16, 8, {"window": 4})
    tensors = case.tensors(torch.bfloat16)
    for name in ("key", "value"):
        hurt = {**tensors, name: tensors[name].clone()}
        hurt[name][0, 0, 24] = torch.nan  # queries 27, 28 and 29 see from 23, 24 and 25 on
        out, _ = decode(case, hurt, backend_isa)
        assert out[0, :, :2].isnan().all()
        assert out[0, :, 2].isfinite().all()
        assert out[1].isfinite().all()


def test_runs_are_equal(backend_isa):
    case = CASES["long"]
    tensors = case.tensors(torch.float16)
    arguments = case.paged(tensors)
    first = ops.attention_decode(**arguments, return_lse=True, backend=backend_isa)
    for _ in range(2):
        again = ops.attention_decode(**arguments, return_lse=True, backend=backend_isa)
        assert all(map(torch.equal, first, again))


def test_nothing_cached(backend_isa):
    """No query: nothing; no sequence: nothing."""
    case = Case((0, 0), 2, 1, 0, 16, 16, 16)
    out, lse = decode(case, case.tensors(torch.bfloat16), backend_isa)
    assert out.shape == (2, 2, 0, 16)
    assert lse.shape == (2, 2, 0)


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


ONE = CASES["one_query"]


def explained(case, **more):
    arguments = case.paged(case.tensors(torch.bfloat16)) | case.options | more
    return str(pytransformer.explain(ops.attention_decode, **arguments))


@needs_cpu
def test_explain_says_where_pages_are_gathered():
    assert explained(ONE) == "attention: cpu"
    wanted = "attention_decode: gathered\n    not in place: {}\nattention: cpu"
    query = randn(3, 4, 1, 24, dtype=torch.bfloat16).requires_grad_()
    assert explained(ONE, query=query) == wanted.format("a gradient is wanted")
    many = explained(Case((40, 33), 8, 1, 9, 8, 8, 16))
    assert many == wanted.format("pages are read for up to 64 queries a key head, not 72")
    with torch.autocast("cpu", dtype=torch.float16):
        assert explained(ONE) == wanted.format("autocast changes the dtype")
    assert "not cpu: it takes float32" in str(
        pytransformer.explain(ops.attention_decode, **ONE.paged(wide(ONE.tensors(torch.float32))))
    )


@needs_cpu
def test_pages_in_place_are_not_gathered(monkeypatch):
    def gather(*_):
        raise AssertionError("pages were gathered")

    for module in ("ops.attention_decode", "reference.attention"):  # functions hide the modules of their names
        monkeypatch.setattr(importlib.import_module(f"pytransformer.{module}"), "gather_pages", gather)
    decode(ONE, ONE.tensors(torch.bfloat16), "auto")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_reach_the_pool(backend):
    """Through gathered pages: what the cache in one piece gets, and 0 where nobody looks."""
    case = Case((9, 21), 4, 2, 2, 8, 8, 4, {"window": 6})
    tensors = {name: x.requires_grad_() for name, x in case.tensors(torch.float32).items()}
    (wanted,) = case.apart(ops.attention, tensors, backend="reference")
    arguments = case.paged(tensors)
    found = ops.attention_decode(**arguments, **case.options, backend=backend)
    torch.testing.assert_close(found, wanted)
    grad = torch.randn_like(wanted)
    names = list(tensors.values())
    for x, y in zip(torch.autograd.grad(found, names, grad), torch.autograd.grad(wanted, names, grad), strict=True):
        torch.testing.assert_close(x, y)


def test_many_queries_are_gathered(backend_isa):
    case = Case((90, 75), 8, 1, 12, 32, 32, 16)
    check(case, case.tensors(torch.bfloat16), backend_isa)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_compiles_to_one_graph(backend):
    torch._dynamo.reset()
    case = CASES["queries_in_a_window"]
    arguments = case.paged(case.tensors(torch.float32))

    def function(query, key, value, lengths, table):
        return ops.attention_decode(
            query, key, value, lengths, block_table=table, window=9, softcap=3.0, return_lse=True, backend=backend
        )

    found = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments.values())
    for x, y in zip(found, function(*arguments.values()), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_opcheck(backend):
    case = CASES["odd_page"]
    given = case.paged(case.tensors(torch.float32))
    pools = (given[name].transpose(1, 2) for name in ("key_cache", "value_cache"))
    args = (
        given["query"],
        *pools,
        None,
        None,
        given["cache_lengths"],
        None,
        -4,
        0,
        0.3,
        0.0,
        0.0,
        given["block_table"],
    )
    args = (*args, None, None, 0, 0, True)
    forward = torch.ops.pytransformer.attention_fwd.default
    torch.library.opcheck(forward, (*args, backend))
    with pytest.raises(ValueError, match="keys and values in pages have no gradient"):
        forward(args[0].requires_grad_(), *args[1:], backend)


@needs_cpu
def test_a_backend_by_name_reads_pages_or_says_why_not():
    tensors = ONE.tensors(torch.float64)
    with pytest.raises(backends.BackendError, match="backend 'cpu' cannot serve this call: it takes float32"):
        ops.attention_decode(**ONE.paged(tensors), backend="cpu")


POOL, QUERY = torch.ones(5, 4, 2, 8), torch.ones(2, 2, 1, 8)
BAD = [
    (
        {"key_cache": POOL[0]},
        ValueError,
        "key_cache must be [pages,page,G,D] with a block_table, got float32 [4, 2, 8]",
    ),
    ({"key_cache": POOL[..., :4]}, ValueError, "key_cache must be [pages,page,G,D] = [5, 4, 2, 8], got"),
    ({"value_cache": POOL[:, :2]}, ValueError, "value_cache must be [pages,page,G,Dv] = [5, 4, 2, 8], got"),
    ({"query": QUERY.expand(2, 2, 1, 8)[:, :1]}, ValueError, "query's heads must be a multiple of key_cache's, got 1"),
    ({"block_table": [[0]]}, TypeError, "block_table must be a tensor, got list"),
    ({"block_table": torch.zeros(2, 3)}, TypeError, "block_table must be integer [B,P], got float32 [2, 3]"),
    ({"block_table": torch.zeros(3, 3).int()}, ValueError, "block_table must be [B,P] = [2, 3], got int32 [3, 3]"),
    ({"block_table": torch.tensor([[0, 9], [5, 9]])}, ValueError, "block_table must name pages 0 to 4, got [9, 5]"),
    ({"cache_lengths": torch.tensor([8, 9])}, ValueError, "between T = 1 and S = 8, got [8, 9]"),
    ({"window": (1, 2)}, ValueError, "window must be a non-negative integer or None, got (1, 2)"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_input(change, error, message):
    table = torch.tensor([[0, 1], [2, -1]])
    good = {"query": QUERY, "key_cache": POOL, "value_cache": POOL, "block_table": table}
    good["cache_lengths"] = torch.tensor([8, 3])
    ops.attention_decode(**good)
    assert_rejects(ops.attention_decode, good | change, error, message)


CACHE = torch.ones(2, 2, 8, 4)
ONE_QUERY = torch.ones(2, 2, 1, 4)
BAD_UNPAGED = [
    ({"cache_lengths": torch.tensor([0, 3])}, ValueError, "between T = 1 and S = 8, got [0, 3]"),
    ({"cache_lengths": torch.tensor([3])}, TypeError, "cache_lengths must be integer [2], got int64 [1]"),
    ({"key_cache": CACHE[:1]}, ValueError, "key_cache must be [B,G,S,D] with B = 2, got float32 [1, 2, 8, 4]"),
    ({"key_cache": CACHE[:, :, 0]}, ValueError, "key_cache must be [B,G,S,D] with B = 2, got float32 [2, 2, 4]"),
    ({"window": -1}, ValueError, "window must be a non-negative integer or None, got -1"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_UNPAGED, ids=[m[:40] for *_, m in BAD_UNPAGED])
def test_bad_input_without_pages(change, error, message):
    good = {"query": ONE_QUERY, "key_cache": CACHE, "value_cache": CACHE, "cache_lengths": torch.tensor([8, 3])}
    assert_rejects(ops.attention_decode, good | change, error, message)
