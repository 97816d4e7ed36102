"""linear over all backends."""

from __future__ import annotations

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    assert_rejects,
    assert_repeats,
    assert_wanted_gradients_only,
    gradcheck,
    randn,
    run,
    skip_unless_served,
)

import pytransformer
from pytransformer import nn, ops, use_backend

# lead, E, O
SHAPES = {
    "one": ((64,), 1, 1),
    "ragged": ((63,), 33, 65),
    "batched": ((2, 5, 3), 64, 127),
    "one_row": ((1,), 80, 256),
    "few_rows": ((9,), 129, 300),
    "several_tiles": ((300,), 100, 270),
    "deep": ((70,), 1100, 20),
}


@pytest.fixture
def backend(backend_isa):
    skip_unless_served(backend_isa, "linear")
    return backend_isa


def check(tensors, backend):
    helpers.check("linear", tensors, {}, backend)


def make(lead, E, out, dtype=torch.float32, bias=True):
    return {
        "input": randn(*lead, E, dtype=dtype),
        "weight": (torch.randn(out, E) / max(E, 1) ** 0.5).to(dtype),
        "bias": randn(out, dtype=dtype) if bias else None,
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, shape, bias, dtype):
    check(make(*SHAPES[shape], dtype, bias), backend)


def test_several_chunks(backend):
    """More rows than the CPU kernels take at a time, whose gradients are summed over the chunks."""
    check(make((700,), 20000, 9, torch.float16), backend)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_an_output_that_no_cache_of_a_core_holds(backend, bias):
    """In float32 the CPU kernel has tokens in rows then."""
    check(make((1100,), 33, 970, bias=bias), backend)


@pytest.mark.parametrize("sizes", [((0,), 8, 12), ((2, 0, 3), 8, 12), ((3,), 0, 12), ((3,), 8, 0)], ids=str)
def test_empty(backend, sizes):
    tensors = make(*sizes)
    found, wanted = run("linear", tensors, {}, backend), run("linear", tensors, {}, "reference")
    for name, x in found.items():
        torch.testing.assert_close(x, wanted[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_views(backend, dtype):
    tensors = make((6, 7), 33, 40, dtype)
    tensors["input"] = randn(7, 6, 33, dtype=dtype).transpose(0, 1)
    tensors["weight"] = randn(33, 41, dtype=dtype)[:, 1:].mT / 6
    tensors["bias"] = randn(1, dtype=dtype).expand(40)
    check(tensors, backend)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_repeated_runs_are_bitwise_equal(backend, dtype):
    assert_repeats("linear", make(*SHAPES["ragged" if dtype == torch.float32 else "batched"], dtype), {}, backend)


def test_only_the_wanted_gradients(backend):
    assert_wanted_gradients_only("linear", make(*SHAPES["ragged"]), {}, backend)


def test_nan_stays_in_its_row(backend):
    tensors = make((90,), 33, 20)
    clean = ops.linear(**tensors, backend=backend)
    tensors["input"][4, 7] = torch.nan
    dirty = ops.linear(**tensors, backend=backend)
    assert dirty[4].isnan().all()
    rest = torch.arange(90) != 4
    torch.testing.assert_close(dirty[rest], clean[rest])


@pytest.fixture
def pretended(monkeypatch):
    """Sets what the processor is said to have: our instruction set, and torch's matrix units."""
    skip_unless_served("cpu", "linear")
    from pytransformer import _cpu
    from pytransformer.backends.cpu import _matrix_units

    def pretend(isa="avx512_bf16", **units):
        monkeypatch.setattr(_cpu, "isa", lambda: isa)
        monkeypatch.setattr(_matrix_units, "_capabilities", lambda: units)

    return pretend


def test_explain_says_where_torchs_product_is_faster(pretended):
    pretended()
    few, many = (make((rows,), 8, 255, torch.bfloat16) for rows in (1024, 1025))
    assert str(pytransformer.explain(ops.linear, **few)) == "linear: cpu"
    reason = "of more than 1024 rows in bfloat16 and at most 255 features torch's own product is faster"
    assert reason in str(pytransformer.explain(ops.linear, **many))
    assert str(pytransformer.explain(ops.linear, **make((1025,), 8, 256, torch.bfloat16))) == "linear: cpu"
    assert str(pytransformer.explain(ops.linear, **make((1025,), 8, 5))) == "linear: cpu"


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, "amx_bf16"), (torch.float16, "amx_fp16")], ids=str)
def test_products_are_torchs_where_it_has_a_matrix_unit_for_them(pretended, dtype, unit):
    few, many = (make((rows,), 8, 300, dtype) for rows in (32, 33))
    network = {name: randn(33, 33, dtype=dtype) for name in ("input", "weight1", "weight2")} | {
        "bias1": None,
        "bias2": None,
    }
    for units, served in (({}, "cpu"), ({unit: True}, "reference")):
        pretended(**units)
        assert pytransformer.explain(ops.linear, **few).decisions[0].backend == "cpu"
        assert pytransformer.explain(ops.linear, **make((33,), 8, 300)).decisions[0].backend == "cpu"
        assert pytransformer.explain(ops.ffn, **network).decisions[0].backend == served
        found = str(pytransformer.explain(ops.linear, **many))
        assert ("this processor's AMX unit" in found) == (served == "reference")


def test_products_that_the_kernels_multiply_with_amx_are_theirs(pretended):
    pretended("amx_bf16", amx_bf16=True)
    linear = {rows: make((rows,), 8, 300, torch.bfloat16) for rows in (33, 1024, 1025)}
    network = {name: randn(33, 33, dtype=torch.bfloat16) for name in ("input", "weight1", "weight2")}
    network |= {"bias1": None, "bias2": None}

    def served(op, tensors):
        return pytransformer.explain(op, **tensors).decisions[0].backend

    assert [served(ops.linear, tensors) for tensors in linear.values()] == ["cpu", "cpu", "reference"]
    assert served(ops.ffn, network) == "cpu"
    network["weight1"].requires_grad_()
    assert served(ops.ffn, network) == "reference", "in training torch's products are as fast"
    network["weight1"].requires_grad_(False)
    assert served(ops.ffn, network) == "cpu", "what served a call in training was remembered for one without"


@pytest.mark.parametrize("rows", [1, 2, 40])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_gradients_that_torch_computes_and_that_the_kernel_computes(pretended, dtype, rows):
    for units in ({}, {"amx_bf16": True, "amx_fp16": True}):
        pretended(**units)
        check(make((rows,), 40, 24, dtype), "cpu")


def test_many_rows_are_served_where_the_backend_is_asked_for():
    skip_unless_served("cpu", "linear")
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    x = randn(4, 100, 16)
    with use_backend("cpu"):
        found = pytransformer.explain(layer, x)
    assert {d.backend for d in found.decisions} == {"cpu"}
    torch.testing.assert_close(found.result, layer(x))


def test_a_product_that_yields_to_torch_is_served_where_the_backend_is_asked_for(pretended):
    pretended()
    tensors = make((1025,), 8, 5, torch.bfloat16)
    assert pytransformer.explain(ops.linear, **tensors).decisions[0].backend == "reference"
    with use_backend("cpu"):
        assert pytransformer.explain(ops.linear, **tensors).decisions[0].backend == "cpu"


def test_bfloat16_is_the_kernels_where_no_instruction_has_it(pretended):
    tensors = make((1030,), 8, 5, torch.bfloat16)
    for isa, served in (("avx2", "cpu"), ("avx512", "cpu"), ("avx512_bf16", "reference"), ("neon", "reference")):
        pretended(isa)
        assert pytransformer.explain(ops.linear, **tensors).decisions[0].backend == served


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_compiled_call_serves_any_number_of_rows(dtype):
    """What hangs on the number of rows is torch's in a graph: it would be compiled anew for 1025."""
    torch.compiler.reset()
    compiled = torch.compile(ops.linear, backend="eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (7, 1024, 1025):
            tensors = make((rows,), 8, 5, dtype)
            expected = F.linear(*(x.float() for x in tensors.values())).to(dtype)
            torch.testing.assert_close(compiled(**tensors), expected)


def test_gradcheck_of_the_reference():
    gradcheck("linear", make((2, 3), 3, 4, torch.float64), {})


def test_it_is_torchs():
    tensors = make((2, 3), 8, 5, torch.float64)
    torch.testing.assert_close(ops.linear(**tensors), F.linear(*tensors.values()))


GOOD = {"input": torch.ones(2, 3, 8), "weight": torch.ones(12, 8), "bias": torch.ones(12)}
BAD = [
    ({"input": 3.0}, TypeError, "input must be a tensor, got float 3.0"),
    ({"input": torch.ones(2, 8).int()}, TypeError, "input must be a floating-point tensor, got int32 [2, 8]"),
    ({"input": torch.tensor(1.0)}, ValueError, "input must be [..., E], got a scalar"),
    ({"weight": None}, TypeError, "weight must be a tensor, got NoneType None"),
    ({"weight": torch.ones(8)}, ValueError, "weight must be a matrix in nn.Linear's layout, got float32 [8]"),
    ({"weight": torch.ones(12, 7)}, ValueError, "weight must be [O,E] = [12, 8], got float32 [12, 7]"),
    ({"weight": torch.ones(12, 8).double()}, TypeError, "weight must have input's dtype torch.float32, got float64"),
    ({"weight": torch.ones(12, 8, device="meta")}, ValueError, "weight must be on input's device cpu, got float32"),
    ({"bias": torch.ones(8)}, ValueError, "bias must be [12], got float32 [8]"),
    ({"bias": torch.ones(12).bfloat16()}, TypeError, "bias must have input's dtype torch.float32, got bfloat16 [12]"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:48] for *_, m in BAD])
def test_bad_input(change, error, message):
    assert_rejects(ops.linear, {**GOOD, **change}, error, message)
