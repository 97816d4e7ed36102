"""embedding over all backends."""

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
    skip_unless_served,
)

import pytransformer
from pytransformer import ops, reference
from pytransformer.backends import BackendError


@pytest.fixture
def backend(backend_isa):
    skip_unless_served(backend_isa, "embedding")
    return backend_isa


POSITIONS = {
    "none": None,
    "[T,E]": (17, 33),
    "[1,T,E]": (1, 17, 33),
    "[B,T,E]": (4, 17, 33),
    "[E]": (33,),
    "[B,1,E]": (4, 1, 33),
}


def make(lead=(4, 17), E=33, V=65, dtype=torch.float32, positions=(17, 33), segments=True):
    return {
        "tokens": torch.randint(0, V, lead),
        "weight": randn(V, E, dtype=dtype),
        "positions": None if positions is None else randn(*positions, dtype=dtype),
        "segments": torch.randint(0, 2, lead, dtype=torch.int32) if segments else None,
        "segment_weight": randn(2, E, dtype=dtype) if segments else None,
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("segments", [True, False], ids=["segments", "no_segments"])
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_against_the_oracle(backend, positions, segments, dtype):
    tensors = make(dtype=dtype, positions=positions, segments=segments)
    check("embedding", tensors, {"scale": 5.7, "dropout_p": 0.1, "seed": 2}, backend)


def test_strided_tokens(backend):
    """A column of a matrix of tokens, as a decoder takes its newest: one stride serves all of it."""
    tensors = make(lead=(4, 17), positions=None)
    columns = {name: tensors[name][:, 3:4] for name in ("tokens", "segments")}
    check("embedding", {**tensors, **columns}, {"scale": 2.0}, backend)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_used_by_many_tokens(backend, dtype):
    """The gradients of a padding token and of two segments, summed in pieces; of a table wider than one piece."""
    tensors = make((3, 70), E=530, V=9, dtype=dtype, positions=(70, 530))
    tensors["tokens"][:, 5:] = 3
    found = check("embedding", tensors, {"scale": 2.0}, backend)
    unused = torch.ones(9).index_fill(0, tensors["tokens"].flatten(), 0).bool()
    assert not found["dweight"][unused].any()


def test_only_wanted_gradients(backend):
    assert_wanted_gradients_only("embedding", make(), {"dropout_p": 0.1, "seed": 1}, backend)


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_no_bit(threads):
    skip_unless_served("cpu", "embedding")
    tensors, before = make((4, 200), E=96, V=20, positions=(200, 96)), torch.get_num_threads()
    weight = tensors["weight"].requires_grad_()

    def call():
        y = ops.embedding(**tensors, dropout_p=0.1, seed=1, backend="cpu")
        return y, torch.autograd.grad(y.square().sum(), weight)[0]

    wanted = call()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(call(), wanted, strict=True))
    finally:
        torch.set_num_threads(before)


def test_explain_says_cpu():
    skip_unless_served("cpu", "embedding")
    assert str(pytransformer.explain(ops.embedding, **make())) == "embedding: cpu"
    with pytest.raises(BackendError, match=r"positions must be as wide as weight, got \[17, 1\]"):
        ops.embedding(**make(positions=(17, 1)), backend="cpu")


def test_definition():
    tensors = make(dtype=torch.float64)
    tokens, weight, positions, segments, segment_weight = tensors.values()
    wanted = 2 * F.embedding(tokens, weight) + positions + F.embedding(segments, segment_weight)
    torch.testing.assert_close(ops.embedding(**tensors, scale=2), wanted)
    keep = reference.dropout_multiplier(wanted.shape, torch.tensor([8, 0]), 0.3, wanted.dtype)
    torch.testing.assert_close(ops.embedding(**tensors, scale=2, dropout_p=0.3, seed=8), wanted * keep)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (3, 0), (2, 3, 5)], ids=str)
def test_shapes(backend, lead):
    tensors = make(lead, positions=None)
    assert ops.embedding(**tensors, backend=backend).shape == (*lead, 33)


def test_repeated_tokens_accumulate(backend):
    tensors = make((200,), positions=None, segments=False)
    tensors["tokens"] = torch.zeros(200, dtype=torch.int64)
    weight = tensors["weight"].requires_grad_()
    ops.embedding(**tensors, backend=backend).sum().backward()
    assert (weight.grad[0] == 200).all()
    assert not weight.grad[1:].any()


def test_repeated_runs_are_bitwise_equal(backend):
    assert_repeats("embedding", make((4, 100), positions=None), {"dropout_p": 0.2, "seed": 1}, backend)


@pytest.mark.parametrize("name", ["tokens", "segments"])
@pytest.mark.parametrize("wrong", [65, -1])
def test_an_index_outside_its_table(name, wrong):
    tensors = make()
    tensors[name][0, 1] = wrong
    with pytest.raises(IndexError):
        ops.embedding(**tensors)


def test_gradcheck_of_the_reference():
    tensors = make((2, 3), 4, 5, torch.float64, positions=(3, 4))
    gradcheck("embedding", tensors, {"scale": 2.0, "dropout_p": 0.2, "seed": 1})


TOKENS = torch.ones(2, 3).long()
GOOD = {"tokens": TOKENS, "weight": torch.ones(11, 8)}
TABLE = torch.ones(2, 8)
BAD = [
    ({"tokens": [1]}, TypeError, "tokens must be a tensor, got list [1]"),
    ({"tokens": torch.ones(2, 3)}, TypeError, "tokens must be int32 or int64, got float32 [2, 3]"),
    ({"tokens": TOKENS.to("meta")}, ValueError, "tokens must be on weight's device cpu, got int64 [2, 3] on meta"),
    ({"weight": None}, TypeError, "weight must be a tensor, got NoneType None"),
    ({"weight": torch.ones(8)}, ValueError, "weight must be [V,E], got float32 [8]"),
    ({"weight": torch.ones(11, 8).int()}, TypeError, "weight must be a floating-point tensor, got int32 [11, 8]"),
    ({"positions": torch.ones(4, 8)}, ValueError, "positions must broadcast to [..., T, E] = [2, 3, 8], got float32"),
    ({"positions": torch.ones(3, 8).double()}, TypeError, "positions must have weight's dtype torch.float32, got fl"),
    ({"segments": TOKENS}, ValueError, "segments and segment_weight go together"),
    ({"segment_weight": TABLE}, ValueError, "segments and segment_weight go together"),
    ({"segments": TOKENS[0], "segment_weight": TABLE}, ValueError, "segments must be [2, 3], got int64 [3]"),
    (
        {"segments": TOKENS, "segment_weight": torch.ones(2, 7)},
        ValueError,
        "segment_weight must be [2, 8], got float32",
    ),
    ({"segments": TOKENS, "segment_weight": torch.ones(8)}, ValueError, "segment_weight must be"),
    ({"scale": float("inf")}, ValueError, "scale must be a finite number, got inf"),
    ({"dropout_p": -1}, ValueError, "dropout_p must be a probability in [0, 1], got -1"),
    ({"dropout_p": 0.1, "seed": "x"}, TypeError, "seed must be an integer"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:48] for *_, m in BAD])
def test_bad_input(change, error, message):
    assert_rejects(ops.embedding, {**GOOD, **change}, error, message)
