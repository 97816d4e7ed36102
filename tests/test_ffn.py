"""ffn over all backends."""

from __future__ import annotations

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

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
# lead, E, F, O
SHAPES = {
    "one": ((64,), 1, 1, 1),
    "ragged": ((63,), 33, 65, 31),
    "batched": ((2, 5, 3), 64, 127, 64),
    "one_row": ((1,), 80, 256, 80),
    "several_tiles": ((130,), 100, 300, 70),
}


def make(lead, E, hidden, out, dtype=torch.float32, biases=True, gated=False):
    tensors = {
        "input": randn(*lead, E, dtype=dtype),
        "weight1": (torch.randn(hidden, E) / E**0.5).to(dtype),
        "bias1": randn(hidden, dtype=dtype) if biases else None,
        "weight2": (torch.randn(out, hidden) / hidden**0.5).to(dtype),
        "bias2": randn(out, dtype=dtype) if biases else None,
    }
    if gated:
        tensors["weight_gate"] = (torch.randn(hidden, E) / E**0.5).to(dtype)
        tensors["bias_gate"] = randn(hidden, dtype=dtype) if biases else None
    return tensors


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no_bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend_isa, activation, biases, dtype):
    tensors = make(*SHAPES["ragged"], dtype, biases)
    check("ffn", tensors, {"activation": activation}, backend_isa)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend_isa, shape, dtype):
    check("ffn", make(*SHAPES[shape], dtype), {"activation": "gelu"}, backend_isa)


KNOWN_MISSES = {
    ("triton-interpreted", 2, torch.float32): (
        "dweight1, 1.03 to 1.2 times the allowed largest error on a Zen 4, where plain PyTorch has dot products for"
        " two tokens; the RMS error is within, and so is the largest with other seeds"
    )
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tokens", [2, 9, 17, 33, 49, 64])
def test_few_tokens(request, backend_isa, tokens, dtype):
    """Around where the CPU kernels take another product; the hidden layer is deeper than one of its blocks."""
    known = KNOWN_MISSES.get((request.node.callspec.params["backend_isa"], tokens, dtype))
    if known is not None:
        request.applymarker(pytest.mark.xfail(reason=known))
    check("ffn", make((tokens,), 129, 2051, 50, dtype, gated=True), {"activation": "silu"}, backend_isa)


def test_large_weights():
    """Of a type that the CPU kernels pack block by block, on the instruction sets that have no products in it."""
    tensors = make((50,), 4096, 2300, 40, torch.bfloat16)
    check("ffn", tensors, {}, "cpu")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_dropout(backend_isa, activation, dtype):
    options = {"activation": activation, "dropout_p": 0.4, "seed": 11}
    check("ffn", make(*SHAPES["batched"], dtype), options, backend_isa)


def test_dropout_is_the_references(backend_isa):
    """With the identity as its second matrix the output is the hidden."""
    hidden = 45
    x, ones = torch.ones(37, 1), torch.ones(hidden, 1)
    for p, seed in ((0.1, 0), (0.5, 7), (0.9, -3), (1.0, 1)):
        out = ops.ffn(x, ones, None, torch.eye(hidden), None, dropout_p=p, seed=seed, backend=backend_isa)
        wanted = reference.dropout_multiplier((37, hidden), torch.tensor([seed, 0]), p, x.dtype)
        torch.testing.assert_close(out, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "sizes",
    [((0,), 8, 12, 8), ((2, 0, 3), 8, 12, 8), ((3,), 8, 0, 8), ((3,), 0, 12, 8), ((3,), 8, 12, 0)],
    ids=["no_row", "no_row_3d", "no_hidden", "no_input", "no_output"],
)
def test_empty(backend_isa, sizes):
    tensors = make(*sizes)
    found = run("ffn", tensors, {}, backend_isa)
    wanted = run("ffn", tensors, {}, "reference")
    for name, x in found.items():
        torch.testing.assert_close(x, wanted[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_views(backend_isa, dtype):
    tensors = make((6, 7), 33, 40, 20, dtype)
    tensors["input"] = randn(7, 6, 33, dtype=dtype).transpose(0, 1)
    tensors["weight1"] = randn(33, 40, dtype=dtype).mT / 6
    tensors["weight2"] = randn(20, 41, dtype=dtype)[:, 1:] / 6
    tensors["bias1"] = randn(1, dtype=dtype).expand(40)
    tensors["bias2"] = randn(41, dtype=dtype)[1::2]
    check("ffn", tensors, {}, backend_isa)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_repeated_runs_are_bitwise_equal(backend_isa, dtype):
    options = {"activation": "gelu", "dropout_p": 0.2, "seed": 3}
    assert_repeats("ffn", make(*SHAPES["several_tiles"], dtype), options, backend_isa)


def test_only_the_wanted_gradients(backend_isa):
    assert_wanted_gradients_only("ffn", make(*SHAPES["ragged"]), {"activation": "silu"}, backend_isa)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("extreme", [1e3, 1e10, -1e10])
def test_extreme_hidden(backend_isa, activation, extreme):
    x = torch.full((3, 4), extreme, requires_grad=True)
    weight = torch.eye(4)
    out = ops.ffn(x, weight, None, weight, None, activation, backend=backend_isa)
    wanted = ACTIVATIONS[activation](x)
    torch.testing.assert_close(out, wanted)
    (grad,), (wanted_grad,) = (torch.autograd.grad(y.sum(), x) for y in (out, wanted))
    torch.testing.assert_close(grad, wanted_grad)


def test_nan_and_inf_stay_in_their_row(backend_isa):
    tensors = make((9,), 33, 40, 20)
    clean = ops.ffn(**tensors, backend=backend_isa)
    tensors["input"][4, 7], tensors["input"][6, 0] = torch.nan, torch.nan
    dirty = ops.ffn(**tensors, backend=backend_isa)
    assert dirty[[4, 6]].isnan().all()
    rest = [0, 1, 2, 3, 5, 7, 8]
    torch.testing.assert_close(dirty[rest], clean[rest])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=str)
def test_gated_of_the_reference(activation, dtype):
    tensors = make((4, 3), 8, 12, 6, dtype, gated=True)
    x, w1, b1, w2, b2, wg, bg = tensors.values()
    wanted = F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)) * F.linear(x, wg, bg), w2, b2)
    torch.testing.assert_close(ops.ffn(**tensors, activation=activation, backend="reference"), wanted)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no_biases"])
def test_gated(backend_isa, activation, dtype, biases):
    tensors = make((67,), 33, 150, 20, dtype, biases=biases, gated=True)
    check("ffn", tensors, {"activation": activation, "dropout_p": 0.2 if biases else 0.0, "seed": 6}, backend_isa)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gradcheck_of_the_reference(activation, gated):
    tensors = make((2, 3), 3, 4, 2, torch.float64, gated=gated)
    options = {"activation": activation, "dropout_p": 0.2, "seed": 1}
    gradcheck("ffn", tensors, options, twice=activation != "relu" and not gated)


GOOD = {
    "input": torch.ones(2, 3, 8),
    "weight1": torch.ones(12, 8),
    "bias1": torch.ones(12),
    "weight2": torch.ones(6, 12),
    "bias2": torch.ones(6),
}
BAD = [
    ({"input": 3.0}, TypeError, "input must be a tensor, got float 3.0"),
    ({"input": torch.ones(2, 8).int()}, TypeError, "input must be a floating-point tensor, got int32 [2, 8]"),
    ({"input": torch.tensor(1.0)}, ValueError, "input must be [..., E], got a scalar"),
    ({"weight1": None}, TypeError, "weight1 must be a tensor, got NoneType None"),
    ({"weight1": torch.ones(8)}, ValueError, "weight1 must be a matrix in nn.Linear's layout, got float32 [8]"),
    ({"weight1": torch.ones(12, 7)}, ValueError, "weight1 must be [F,E] = [12, 8], got float32 [12, 7]"),
    ({"weight2": torch.ones(6, 11)}, ValueError, "weight2 must be [O,F] = [6, 12], got float32 [6, 11]"),
    ({"weight2": torch.ones(6, 12).double()}, TypeError, "weight2 must have input's dtype torch.float32, got float64"),
    ({"weight2": torch.ones(6, 12, device="meta")}, ValueError, "weight2 must be on input's device cpu, got float32"),
    ({"bias1": torch.ones(8)}, ValueError, "bias1 must be [12], got float32 [8]"),
    ({"bias2": torch.ones(6).bfloat16()}, TypeError, "bias2 must have input's dtype torch.float32, got bfloat16 [6]"),
    ({"activation": "tanh"}, ValueError, "activation must be one of 'relu', 'gelu', 'gelu_tanh', 'silu'; got 'tanh'"),
    ({"dropout_p": 2}, ValueError, "dropout_p must be a probability in [0, 1], got 2"),
    ({"weight_gate": torch.ones(12, 9)}, ValueError, "weight_gate must be [F,E] = [12, 8], got float32 [12, 9]"),
    ({"bias_gate": torch.ones(12)}, ValueError, "bias_gate was given without weight_gate"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:48] for *_, m in BAD])
def test_bad_input(change, error, message):
    assert_rejects(ops.ffn, {**GOOD, **change}, error, message)
