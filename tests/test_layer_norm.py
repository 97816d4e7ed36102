"""layer_norm and rms_norm over all backends."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    DTYPES,
    assert_rejects,
    assert_repeats,
    assert_wanted_gradients_only,
    check,
    gradcheck,
    randn,
    run,
)

from pytransformer import ops, reference
from pytransformer.ops.layer_norm import _op

SHAPES = ((3, 7, 64), (70, 3), (2, 65), (5, 1, 127), (63, 33), (2, 1023), (130, 8), (1, 300))
FLAGS = list(product((False, True), repeat=6))  # weight, bias, residual, input_bias, dropout, prenorm
LETTERS = "wbridp"
ALL = {"dropout_p": 0.3, "seed": 1234, "prenorm": True}


def make(shape, dtype=torch.float32, flags=(True,) * 4, vector_dtype=None):
    vector_dtype, E = vector_dtype or dtype, shape[-1]
    tensors = {
        "input": randn(*shape, dtype=dtype),
        "weight": 1 + randn(E, dtype=vector_dtype) / 8,
        "bias": randn(E, dtype=vector_dtype),
        "residual": randn(*shape, dtype=dtype),
        "input_bias": randn(E, dtype=vector_dtype),
    }
    for name, wanted in zip(("weight", "bias", "residual", "input_bias"), flags, strict=True):
        if not wanted:
            tensors[name] = None
    return tensors


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize(
    "flags", FLAGS, ids=["".join(c for c, on in zip(LETTERS, f, strict=True) if on) or "none" for f in FLAGS]
)
def test_every_combination(backend_isa, dtype, op, flags):
    weight, bias, residual, input_bias, dropout, prenorm = flags
    if op == "rms_norm" and bias:
        pytest.skip("rms_norm has no bias")
    tensors = make(SHAPES[FLAGS.index(flags) % len(SHAPES)], dtype, flags[:4])
    if op == "rms_norm":
        del tensors["bias"]
    check(op, tensors, {"dropout_p": 0.3 * dropout, "seed": 2, "prenorm": prenorm}, backend_isa)


@pytest.mark.parametrize("E", [1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 513, 1023])
def test_every_tail(backend_isa, E):
    # Of one and two columns the gradient cancels (the output does not depend on the sum, or hardly); that of a vector
    # is the sum of what cancels over the rows.
    rows = max(3, 256 // E)
    sizes = {"input": 1.0, "residual": 1.0, "input_bias": rows**0.5, "weight": rows**0.5}
    cancels = {f"d{name}": size for name, size in sizes.items()} if E <= 2 else None
    for dtype in DTYPES.values():
        check("layer_norm", make((rows, E), dtype), ALL, backend_isa, magnitudes=cancels)


@pytest.mark.parametrize("rows", [1, 2, 3, 63, 65, 257, 1000])
def test_rows(backend_isa, rows):
    check("layer_norm", make((rows, 24)), {}, backend_isa)


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (3, 0)], ids=str)
def test_empty(backend_isa, shape):
    for name, x in run("layer_norm", make(shape), ALL, backend_isa).items():
        assert not x.any(), name


def test_float32_parameters_with_bfloat16_input(backend_isa):
    check("layer_norm", make((65, 33), torch.bfloat16, vector_dtype=torch.float32), ALL, backend_isa)


@pytest.mark.parametrize("offset", [100.0, -1000.0])
def test_large_mean_does_not_cancel(backend_isa, offset):
    tensors = make((9, 256), flags=(True, True, False, False))
    tensors["input"] += offset
    check("layer_norm", tensors, {}, backend_isa)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.1])
def test_eps(backend_isa, eps):
    tensors = make((9, 40), flags=(True, True, False, False))
    check("layer_norm", tensors, {"eps": eps}, backend_isa)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_views(backend_isa, dtype):
    tensors = make((4, 6, 34), dtype)
    tensors["input"] = randn(6, 4, 34, dtype=dtype).transpose(0, 1)
    tensors["residual"] = randn(4, 6, 35, dtype=dtype)[..., 1:]  # misaligned
    tensors["weight"] = randn(68, dtype=dtype)[::2]
    tensors["bias"] = randn(1, dtype=dtype).expand(34)
    tensors["input_bias"] = randn(35, dtype=dtype)[1:]
    check("layer_norm", tensors, ALL, backend_isa)
    tensors["residual"] = randn(34, dtype=dtype).expand(4, 6, 34)
    check("layer_norm", tensors, ALL, backend_isa)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_dropout_is_the_references(backend_isa, p):
    x, residual = torch.ones(37, 45), torch.zeros(37, 45)
    for seed in (0, 7, -3, 2**63 + 11):
        _, total = ops.layer_norm(x, None, None, residual, dropout_p=p, prenorm=True, seed=seed, backend=backend_isa)
        signed = (seed + 2**63) % 2**64 - 2**63
        wanted = reference.dropout_multiplier(x.shape, torch.tensor([signed, 0]), p, x.dtype)
        torch.testing.assert_close(total, wanted, rtol=1e-6, atol=0)
    rng = torch.tensor([5, 2**40 + 1])
    _, total = ops.layer_norm(x, None, None, residual, dropout_p=p, prenorm=True, seed=rng, backend=backend_isa)
    torch.testing.assert_close(total, reference.dropout_multiplier(x.shape, rng, p, x.dtype), rtol=1e-6, atol=0)


def test_dropout_rate_and_seeds(backend_isa):
    x = torch.ones(200, 500)

    def dropped(**options):
        _, total = ops.layer_norm(x, None, dropout_p=0.25, prenorm=True, backend=backend_isa, **options)
        return total == 0

    first = dropped(seed=1)
    assert abs(first.float().mean() - 0.25) < 0.01
    assert torch.equal(first, dropped(seed=1))
    assert not torch.equal(first, dropped(seed=2))
    torch.manual_seed(3)
    second, third = dropped(), dropped()
    assert not torch.equal(second, third)
    torch.manual_seed(3)
    assert torch.equal(second, dropped())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_repeated_runs_are_bitwise_equal(backend_isa, dtype):
    assert_repeats("layer_norm", make((517, 129), dtype), ALL, backend_isa)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_inference_gives_what_training_gives(backend_isa, dtype):
    """Though it stores less; where it need not store the sum, in float32, to the bit as well."""
    tensors, options = make((9, 40), dtype), {"dropout_p": 0.3, "seed": 5, "backend": backend_isa}
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    trained = ops.layer_norm(**leaves, **options, prenorm=True)
    with torch.no_grad():
        found = ops.layer_norm(**tensors, **options, prenorm=True)
        alone = ops.layer_norm(**tensors, **options)
    assert all(map(torch.equal, found, trained))
    assert dtype != torch.float32 or torch.equal(alone, trained[0])


def test_only_the_wanted_gradients(backend_isa):
    assert_wanted_gradients_only("layer_norm", make((5, 12)), {}, backend_isa)


@pytest.mark.parametrize("index", [0, 1], ids=["output", "sum"])
def test_one_output_of_prenorm_differentiated(backend_isa, index):
    tensors = make((5, 12))

    def grads(backend, dtype):
        leaves = {n: x.to(dtype).requires_grad_() for n, x in tensors.items()}
        loss = ops.layer_norm(**leaves, **ALL, backend=backend)[index].square().sum()
        return torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)

    for name, actual, wanted in zip(
        tensors, grads(backend_isa, torch.float32), grads("reference", torch.float64), strict=True
    ):
        if wanted is None:  # the sum does not depend on weight and bias
            assert actual is None or not actual.any(), name
        else:
            torch.testing.assert_close(actual, wanted, check_dtype=False, rtol=1e-4, atol=1e-4)


def test_nan_and_inf_stay_in_their_row(backend_isa):
    x, weight = randn(6, 40), randn(40)
    clean = ops.layer_norm(x, weight, backend=backend_isa)
    x[2, 3], x[4, 39] = torch.nan, torch.inf
    dirty = ops.layer_norm(x, weight, backend=backend_isa)
    assert dirty[[2, 4]].isnan().all()
    rest = [0, 1, 3, 5]
    assert torch.equal(dirty[rest], clean[rest])


def test_matches_torch_layer_norm(backend_isa):
    x, weight, bias = randn(7, 96), randn(96), randn(96)
    torch.testing.assert_close(
        ops.layer_norm(x, weight, bias, backend=backend_isa), F.layer_norm(x, (96,), weight, bias)
    )
    torch.testing.assert_close(
        ops.rms_norm(x, weight, eps=1e-6, backend=backend_isa), F.rms_norm(x, (96,), weight, 1e-6)
    )


@pytest.mark.parametrize("flags", [f for f in FLAGS if sum(f) in (0, 5, 6)], ids=str)
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_gradcheck_of_the_reference(flags, op):
    tensors = make((2, 3, 5), torch.float64, flags[:4])
    if op == "rms_norm":
        del tensors["bias"]
    gradcheck(op, tensors, {"dropout_p": 0.3 * flags[4], "seed": 3, "prenorm": flags[5]})


def test_gradcheck_of_the_library_op_on_the_reference():
    leaves = [x.requires_grad_() for x in make((2, 3, 5), torch.float64).values()]

    def function(*xs):
        return _op.library_forward(*xs, torch.tensor([3, 0]), 0.3, 1e-5, False, True, "reference")[:2]

    assert torch.autograd.gradcheck(function, leaves)


def test_double_backward(backend_isa):
    tensors = make((4, 9))

    def second(backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in tensors.values()]
        y = ops.layer_norm(*leaves[:4], input_bias=leaves[4], dropout_p=0.3, seed=1, backend=backend)
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves, allow_unused=True)

    for name, actual, wanted in zip(
        tensors, second(backend_isa, torch.float32), second("reference", torch.float64), strict=True
    ):
        torch.testing.assert_close(
            actual, wanted, check_dtype=False, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


GOOD = {"input": torch.ones(2, 3, 8), "weight": torch.ones(8)}
BAD = [
    ({"input": 3.0}, TypeError, "input must be a tensor, got float 3.0"),
    (
        {"input": torch.ones(2, 8, dtype=torch.int32)},
        TypeError,
        "input must be a floating-point tensor, got int32 [2, 8]",
    ),
    ({"input": torch.tensor(1.0)}, ValueError, "input must be [..., E], got a scalar"),
    ({"weight": torch.ones(7)}, ValueError, "weight must be [8], got float32 [7]"),
    ({"weight": torch.ones(1, 8)}, ValueError, "weight must be [8], got float32 [1, 8]"),
    ({"weight": torch.ones(8, dtype=torch.int64)}, TypeError, "weight must be a floating-point tensor, got int64"),
    (
        {"weight": torch.ones(8, device="meta")},
        ValueError,
        "weight must be on input's device cpu, got float32 [8] on meta",
    ),
    ({"input_bias": torch.ones(9)}, ValueError, "input_bias must be [8], got float32 [9]"),
    ({"residual": torch.ones(2, 8)}, ValueError, "residual must be [2, 3, 8], got float32 [2, 8]"),
    (
        {"residual": torch.ones(2, 3, 8).bfloat16()},
        TypeError,
        "residual must have input's dtype torch.float32, got bfl",
    ),
    ({"residual": torch.ones(2, 3, 8, device="meta")}, ValueError, "residual must be on input's device cpu"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must be a probability in [0, 1], got 1.5"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p must be a probability in [0, 1], got nan"),
    ({"dropout_p": "half"}, ValueError, "dropout_p must be a probability in [0, 1], got 'half'"),
    ({"eps": float("nan")}, ValueError, "eps must be a finite number, got nan"),
    ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
    ({"dropout_p": 0.1, "seed": 1.5}, TypeError, "seed must be an integer"),
    ({"dropout_p": 0.1, "seed": True}, TypeError, "seed must be an integer"),
    (
        {"dropout_p": 0.1, "seed": torch.ones(2)},
        ValueError,
        "seed tensor must be int64 [2] (seed, offset), got float32 [2]",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:48] for *_, m in BAD])
@pytest.mark.parametrize("op", [ops.layer_norm, ops.rms_norm], ids=lambda f: f.__name__)
def test_bad_input(op, change, error, message):
    assert_rejects(op, {**GOOD, **change}, error, message)


def test_bad_bias():
    assert_rejects(ops.layer_norm, {**GOOD, "bias": torch.ones(3)}, ValueError, "bias must be [8], got float32 [3]")
