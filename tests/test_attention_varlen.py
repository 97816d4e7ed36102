"""attention_varlen: each sequence by itself is what it must give, wherever among the others it lies."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers import DTYPES, assert_rejects, assert_repeats, check, randn, run

import pytransformer
from pytransformer import backends, ops

needs_cpu = pytest.mark.skipif(backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu")))


def offsets(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@dataclass(frozen=True)
class Case:
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    H: int = 2
    G: int = 2
    D: int = 32
    Dv: int = 32
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        T, S = sum(self.queries), sum(self.keys)
        q, k = randn(T, self.H, self.D, dtype=dtype), randn(S, self.G, self.D, dtype=dtype)
        packing = {"cu_seq_q": offsets(self.queries), "cu_seq_k": offsets(self.keys)}
        return {"query": q, "key": k, "value": randn(S, self.G, self.Dv, dtype=dtype), **packing}

    @property
    def all_options(self) -> dict[str, Any]:
        return self.options if self.H == self.G else {"enable_gqa": True, **self.options}


SELF, FROM_THE_END = (5, 0, 70, 1, 33), {"causal_align": "bottom_right"}
CASES = {
    "self": Case(SELF, SELF),
    "causal": Case(SELF, SELF, 4, 2, 16, 24, {"is_causal": True}),
    "cross": Case((5, 0, 33, 1, 4), (7, 3, 20, 64, 0), 4, 1, 24, 40),
    "causal_cross": Case((50, 9, 33), (7, 30, 80), 2, 1, 16, 16, {"is_causal": True}),
    "at_the_end": Case((5, 70, 33, 1), (17, 65, 33, 64), options={"is_causal": True, **FROM_THE_END}),
    "window": Case((40, 3, 66), (40, 3, 66), 2, 2, 64, 64, {"window": (6, 2)}),
    "window_at_the_end": Case((20, 66, 2), (41, 40, 130), options={"window": (9, 0), **FROM_THE_END, "softcap": 5.0}),
    "few_queries": Case((1, 4, 0, 2), (70, 5, 9, 130), 2, 1, 24, 40, {"is_causal": True, **FROM_THE_END}),
    "dropped": Case((5, 70, 1), (5, 70, 1), 4, 2, 16, 24, {"is_causal": True, "dropout_p": 0.3, "seed": 5}),
    "dropped_cross": Case((33, 2), (20, 40), options={"dropout_p": 0.2, "seed": 6, "scale": 0.4}),
    "one": Case((97,), (97,), 2, 1, 80, 80, {"is_causal": True}),
    "long_keys": Case((2, 0, 1), (520, 3, 70), 2, 1, 16, 24, {"is_causal": True, **FROM_THE_END}),
    "many": Case(tuple(range(1, 12)), tuple(range(11, 0, -1)), 3, 1, 16, 16),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_parity(backend_isa, name, dtype):
    case = CASES[name]
    check("attention_varlen", case.tensors(dtype), case.all_options, backend_isa)


@pytest.mark.parametrize("name", CASES)
def test_each_sequence_alone(backend_isa, name):
    """The same bits of rows as a batch of one gives, whose neighbours cannot reach it; and its lse."""
    case, dtype = CASES[name], torch.bfloat16
    if "dropout_p" in case.options:
        pytest.skip("the bits of dropout count the sequences")
    tensors, options = case.tensors(dtype), {**case.all_options, "return_lse": True, "backend": backend_isa}
    out, lse = ops.attention_varlen(**tensors, **options)
    assert lse.shape == (case.H, sum(case.queries))
    queries, keys = (tensors[name].tolist() for name in ("cu_seq_q", "cu_seq_k"))
    for n in range(len(case.queries)):
        rows, seen = slice(queries[n], queries[n + 1]), slice(keys[n], keys[n + 1])
        one = (tensors["query"][rows], tensors["key"][seen], tensors["value"][seen])
        alone = (x.transpose(0, 1)[None] for x in one)
        wanted, wanted_lse = ops.attention(*alone, **case.all_options, return_lse=True, backend="reference")
        torch.testing.assert_close(out[rows], wanted[0].transpose(0, 1), rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(lse[:, rows], wanted_lse[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("hurt", ["query", "key", "value"])
def test_poison_stays_in_its_sequence(backend_isa, hurt):
    case = Case((5, 40, 33), (7, 33, 40))
    tensors = case.tensors(torch.bfloat16)
    tensors[hurt][case.queries[0] + 12 if hurt == "query" else case.keys[0] + 12] = torch.nan
    for name, x in run("attention_varlen", tensors, {}, backend_isa).items():
        lengths = case.keys if name in ("dkey", "dvalue") else case.queries
        first, inside, last = x.split(lengths)
        assert first.isfinite().all(), name
        assert last.isfinite().all(), name
        assert name != "output" or inside.isnan().any()


def test_layouts(backend_isa):
    """Slices of one projection, heads first, features first: the same bits."""
    case, dtype = Case((40, 9), (40, 9), 2, 2, 32, 32, {"is_causal": True}), torch.bfloat16
    both = randn(49, 3, 2, 32, dtype=dtype)
    cu = offsets(case.queries)
    q, k, v = (both[:, i] for i in range(3))
    wanted = ops.attention_varlen(q, k, v, cu, **case.options, backend=backend_isa)
    for turn in (lambda x: x.contiguous(), lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        found = ops.attention_varlen(*map(turn, (q, k, v)), cu, **case.options, backend=backend_isa)
        assert torch.equal(found, wanted)
    features_first = (x.mT.contiguous().mT for x in (q, k, v))
    assert torch.equal(ops.attention_varlen(*features_first, cu, **case.options, backend=backend_isa), wanted)
    assert torch.equal(ops.attention_varlen(q, k, v, cu.long(), **case.options, backend=backend_isa), wanted)
    longer = ops.attention_varlen(q, k, v, cu, max_q=45, max_k=49, **case.options, backend=backend_isa)
    assert torch.equal(longer, wanted)
    assert wanted.is_contiguous()


def test_runs_are_equal(backend_isa):
    case = CASES["causal"]
    assert_repeats("attention_varlen", case.tensors(torch.bfloat16), case.all_options, backend_isa)


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_no_tokens(backend_isa, lengths):
    case = Case(lengths, lengths)
    found = run("attention_varlen", case.tensors(torch.bfloat16), {}, backend_isa)
    assert all(x.shape == (0, 2, 32) for x in found.values())


@needs_cpu
def test_nothing_is_padded():
    """Room for the longest sequence times their number would be 16 GB a tensor."""
    lengths = (4000, *(1 for _ in range(4000)))
    q = randn(sum(lengths), 2, 32).requires_grad_()
    out, lse = ops.attention_varlen(q.detach(), q.detach(), q.detach(), offsets(lengths), return_lse=True)
    torch.testing.assert_close(out[4000:], q[4000:].detach())
    assert lse.shape == (2, 8000)
    (grad,) = torch.autograd.grad(ops.attention_varlen(q, q, q, offsets(lengths)).sum(), q)
    assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_opcheck(backend):
    case = CASES["at_the_end"]
    q, k, v, *cu = case.tensors().values()
    heads = (x.transpose(0, 1)[None].requires_grad_() for x in (q, k, v))
    longest = max(case.queries), max(case.keys)
    args = (*heads, None, None, None, None, None, 0, 0.2, 0.0, 0.0, None, *cu, *longest, True, backend)
    torch.library.opcheck(torch.ops.pytransformer.attention_fwd.default, args)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])
def test_compiles_to_one_graph(backend):
    torch._dynamo.reset()
    q, k, v, *cu = CASES["causal"].tensors().values()
    options = {"max_q": 70, "max_k": 70, "is_causal": True, "enable_gqa": True, "backend": backend}

    def function(q, k, v, cu_seq_q, cu_seq_k):
        return ops.attention_varlen(q, k, v, cu_seq_q, cu_seq_k, **options)

    found = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v, *cu)
    torch.testing.assert_close(found, function(q, k, v, *cu))


@needs_cpu
def test_a_compiled_call_does_not_run_over_the_longest_sequence():
    """Nobody looks at offsets while a call is traced; the kernel's binding does."""
    torch._dynamo.reset()
    q, cu = randn(9, 2, 8), torch.tensor([0, 7, 9])
    function = torch.compile(lambda q, cu: ops.attention_varlen(q, q, q, cu, max_q=4), backend="aot_eager")
    with pytest.raises(ValueError, match="cu_seq_q must never fall, and rise by at most 4"):
        function(q, cu)


@needs_cpu
def test_a_double_backward():
    q, k, v, *cu = CASES["causal"].tensors().values()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = []
    for backend in ("cpu", "reference"):
        out = ops.attention_varlen(*leaves, *cu, is_causal=True, enable_gqa=True, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@needs_cpu
def test_explain_names_the_kernel():
    q, k, v, cu, _ = CASES["self"].tensors().values()
    assert str(pytransformer.explain(ops.attention_varlen, q, k, v, cu)) == "attention: cpu"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.attention_varlen(q, k, v, cu).dtype == torch.bfloat16
    assert "not cpu: it takes float32" in str(pytransformer.explain(ops.attention_varlen, *(q.double(),) * 3, cu))
    with pytest.raises(backends.BackendError, match="lse carries gradients in the reference only"):
        ops.attention_varlen(q.requires_grad_(), k, v, cu, return_lse=True, backend="cpu")


Q, CU = torch.ones(6, 2, 4), torch.tensor([0, 2, 6])
BAD = [
    ({"query": torch.ones(2, 4)}, ValueError, "query must be [T,H,D], got float32 [2, 4]"),
    ({"cu_seq_q": CU.float()}, TypeError, "cu_seq_q must be integer [N+1], got float32 [3]"),
    ({"cu_seq_q": CU[None]}, TypeError, "cu_seq_q must be integer [N+1], got int64 [1, 3]"),
    ({"cu_seq_q": torch.tensor([0, 7, 6])}, ValueError, "cu_seq_q must rise from 0 to 6, got [0, 7, 6]"),
    ({"cu_seq_q": torch.tensor([0, 2, 5])}, ValueError, "cu_seq_q must rise from 0 to 6, got [0, 2, 5]"),
    ({"cu_seq_k": torch.tensor([0, 6])}, ValueError, "cu_seq_k must be of as many sequences as cu_seq_q, 2; got 1"),
    ({"max_q": 3}, ValueError, "max_q must be at least the longest sequence, 4; got 3"),
    ({"window": -1}, ValueError, "window must be a non-negative integer, a pair of them or None, got -1"),
    ({"value": torch.ones(5, 2, 4)}, ValueError, "value must be [Tk,G,Dv] = [6, 2, 4], got float32 [5, 2, 4]"),
    ({"key": Q[:, :1], "value": Q[:, :1]}, ValueError, "key must have query's 2 heads, got 1; pass enable_gqa=True"),
    ({"softcap": -1.0}, ValueError, "softcap must not be negative, got -1.0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_input(change, error, message):
    good = {"query": Q, "key": Q, "value": Q, "cu_seq_q": CU}
    ops.attention_varlen(**good)
    assert_rejects(ops.attention_varlen, good | change, error, message)
