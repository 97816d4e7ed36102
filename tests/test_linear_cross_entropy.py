"""linear_cross_entropy over all backends."""

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
    skip_unless_served,
)

import pytransformer
from pytransformer import ops
from pytransformer.backends import _loss_by_chunks

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 5.0},
    "ignore": {"ignore_index": 2},
    "everything": {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 5.0, "ignore_index": 0, "reduction": "sum"},
}


@pytest.fixture
def backend(backend_isa):
    skip_unless_served(backend_isa, "linear_cross_entropy")
    return backend_isa


def make(lead=(4, 17), E=33, V=65, dtype=torch.float32, bias=True):
    target = torch.randint(0, V, lead)
    target.flatten()[::5] = -100
    return {
        "input": randn(*lead, E, dtype=dtype),
        "linear_weight": (torch.randn(V, E) / E**0.5).to(dtype),
        "linear_bias": randn(V, dtype=dtype) if bias else None,
        "target": target,
    }


def for_ignore_index(tensors, options):
    if "ignore_index" in options:
        tensors["target"] = tensors["target"].masked_fill(tensors["target"] == -100, options["ignore_index"])
    return tensors


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_against_the_oracle(backend, options, bias, dtype):
    check("linear_cross_entropy", for_ignore_index(make(dtype=dtype, bias=bias), options), options, backend)


SIZES = {
    "many rows": ((4200,), 9, 70),  # several chunks of them
    "many classes": ((19,), 33, 1500),  # several blocks of them
    "parts of classes": ((20,), 40, 2500),  # each a thread's
    "deep": ((7,), 600, 130),
    "one class": ((23,), 8, 1),
    "one row": ((1,), 8, 300),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_sizes(backend, size, dtype):
    tensors = make(*size, dtype=dtype)
    tensors["target"][..., 0] = 0  # one that counts
    options = {"reduction": "sum", "label_smoothing": 0.1, "z_loss": 1e-3}
    magnitudes = {"dinput": 1e-6, "dlinear_weight": 1e-6, "dlinear_bias": 1e-6} if size[2] == 1 else {}
    check("linear_cross_entropy", tensors, options, backend, magnitudes=magnitudes)


def test_no_rows(backend):
    tensors = make((0,))
    inputs = [tensors[n].requires_grad_() for n in ("input", "linear_weight", "linear_bias")]
    loss = ops.linear_cross_entropy(**tensors, reduction="sum", backend=backend)
    assert loss == 0
    for x, gradient in zip(inputs, torch.autograd.grad(loss, inputs), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_wanted_gradients(backend, reduction):
    assert_wanted_gradients_only("linear_cross_entropy", make(), {"reduction": reduction, "softcap": 5.0}, backend)


def test_classes_behind_a_bias_of_minus_infinity(backend):
    tensors = make(V=700)
    tensors["linear_bias"][300:650] = -torch.inf
    tensors["target"] = torch.randint(0, 300, (4, 17))
    found = check("linear_cross_entropy", tensors, {}, backend)
    assert not found["dlinear_weight"][300:650].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_rows_of_logits_start_at_vectors_and_what_lies_between_is_not_used(backend, dtype, monkeypatch):
    if backend not in ("triton", "cuda"):
        pytest.skip("this backend stores no rows of logits")
    room = _loss_by_chunks._room_for_logits

    def poisoned(x, classes):
        logits = room(x, classes)
        assert logits.stride(0) % 16 == 0
        logits.as_strided((logits.shape[0], logits.stride(0)), logits.stride()).fill_(torch.nan)
        return logits

    monkeypatch.setattr(_loss_by_chunks, "_room_for_logits", poisoned)
    check("linear_cross_entropy", make((70,), V=131, dtype=dtype), {"label_smoothing": 0.1}, backend)


def test_logits_of_any_size(backend):
    tensors = make()
    tensors["input"] = tensors["input"] * 1e4
    check("linear_cross_entropy", tensors, {}, backend)


def test_nan_in_an_ignored_row_stays_there():
    skip_unless_served("cpu", "linear_cross_entropy")
    tensors = make()
    wanted = run("linear_cross_entropy", tensors, {}, "cpu")
    tensors["input"][tensors["target"] == -100] = torch.nan
    for name, x in run("linear_cross_entropy", tensors, {}, "cpu").items():
        assert torch.equal(x, wanted[name]), name


def test_stored_gradients_are_scaled_once_a_backward(backend):
    tensors = make()
    x, weight, bias = (tensors[n].requires_grad_() for n in ("input", "linear_weight", "linear_bias"))
    loss = ops.linear_cross_entropy(**tensors, backend=backend)
    once = torch.autograd.grad(loss, (x, weight, bias), retain_graph=True)
    for factor, keep in ((3, True), (1, True), (0.5, False)):
        scaled = torch.autograd.grad(factor * loss, (x, weight, bias), retain_graph=keep)
        for a, b in zip(once, scaled, strict=True):
            torch.testing.assert_close(factor * a, b)


@pytest.mark.parametrize("factor", [1, 3])
def test_the_last_backward_copies_no_stored_gradient(backend, factor):
    tensors = make()
    inputs = [tensors[n].requires_grad_() for n in ("input", "linear_weight", "linear_bias")]
    loss = ops.linear_cross_entropy(**tensors, backend=backend)
    if backend == "reference":
        pytest.skip("the reference stores no gradients")
    stored = {x.data_ptr() for x in loss.grad_fn.saved_tensors if x is not None}
    assert {g.data_ptr() for g in torch.autograd.grad(factor * loss, inputs)} <= stored


def test_parameters_own_their_gradients(backend):
    tensors = make()
    weight = tensors["linear_weight"].requires_grad_()
    loss = ops.linear_cross_entropy(**tensors, backend=backend)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * first)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_that_the_forward_did_not_store(backend, reduction):
    tensors = make()
    x, weight, bias, target = (tensors[n] for n in ("input", "linear_weight", "linear_bias", "target"))
    x.requires_grad_()
    args = (x, weight, bias, target, reduction, -100, 0.1, 0.0, 0.0)
    forward = torch.ops.pytransformer.linear_cross_entropy_fwd
    wanted, actual = (
        torch.autograd.grad(forward(*args, [n, False, False], backend)[0], x)[0] for n in (True, False)
    )  # fmt: skip
    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("threads", [1, 2, 5, 12])
@pytest.mark.parametrize(("rows", "classes"), [(300, 1100), (40, 2304)], ids=["shared", "parts"])
def test_the_number_of_threads(threads, rows, classes):
    """The 9 parts of the vocabulary go to a thread each, but for 12 threads, of which too many would wait."""
    skip_unless_served("cpu", "linear_cross_entropy")
    tensors = make((rows,), 33, classes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check("linear_cross_entropy", tensors, {"label_smoothing": 0.1}, "cpu")
        assert_repeats("linear_cross_entropy", tensors, {}, "cpu")
    finally:
        torch.set_num_threads(before)


def test_explain_says_cpu():
    skip_unless_served("cpu", "linear_cross_entropy")
    assert str(pytransformer.explain(ops.linear_cross_entropy, **make())) == "linear_cross_entropy: cpu"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_torch(options):
    """The definition, against F.cross_entropy and the z-loss written out."""
    tensors = for_ignore_index(make(dtype=torch.float64), options)
    x, weight, bias, target = tensors.values()
    rest = dict(options)
    z_loss, softcap = rest.pop("z_loss", 0.0), rest.pop("softcap", None)
    logits = F.linear(x, weight, bias).flatten(0, 1)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = F.cross_entropy(logits, target.flatten(), **rest)
    counted = target.flatten() != options.get("ignore_index", -100)
    z = z_loss * logits.logsumexp(-1).square() * counted
    reduction = options.get("reduction", "mean")
    wanted = wanted + {"none": z, "sum": z.sum(), "mean": z.sum() / counted.sum()}[reduction]
    actual = ops.linear_cross_entropy(**tensors, **options, backend="reference")
    torch.testing.assert_close(actual, wanted.reshape(actual.shape))


@pytest.mark.parametrize("lead", [(1,), (), (0,), (2, 0), (127,), (2, 3, 5)], ids=str)
def test_shapes(backend, lead):
    tensors = make((5,))
    tensors["input"], tensors["target"] = randn(*lead, 33), torch.randint(0, 65, lead)
    loss = ops.linear_cross_entropy(**tensors, reduction="none", backend=backend)
    assert loss.shape == lead
    assert loss.dtype == torch.float32


def test_the_mean_of_no_target_is_nan(backend):
    tensors = make()
    tensors["target"].fill_(-100)
    assert ops.linear_cross_entropy(**tensors, backend=backend).isnan()
    assert ops.linear_cross_entropy(**tensors, reduction="sum", backend=backend) == 0


def test_ignored_rows_have_no_gradient(backend):
    tensors = make()
    x = tensors["input"].requires_grad_()
    ops.linear_cross_entropy(**tensors, z_loss=0.1, label_smoothing=0.1, backend=backend).backward()
    ignored = tensors["target"] == -100
    assert not x.grad[ignored].any()
    assert x.grad[~ignored].any(-1).all()


def test_repeated_runs_are_bitwise_equal(backend):
    assert_repeats("linear_cross_entropy", make(), OPTIONS["smoothing"], backend)


@pytest.mark.parametrize("wrong", [65, -1, 2**40])
def test_a_target_outside_the_vocabulary(wrong):
    tensors = make()
    tensors["target"][0, 1] = wrong
    with pytest.raises(IndexError):
        ops.linear_cross_entropy(**tensors)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck_of_the_reference(options):
    tensors = for_ignore_index(make((5,), 3, 4), options)
    gradcheck("linear_cross_entropy", tensors, options)


GOOD = {"input": torch.ones(2, 3, 8), "linear_weight": torch.ones(11, 8), "target": torch.ones(2, 3).long()}
BAD = [
    ({"input": None}, TypeError, "input must be a tensor, got NoneType None"),
    ({"input": torch.ones(2, 3, 8).int()}, TypeError, "input must be a floating-point tensor, got int32 [2, 3, 8]"),
    ({"linear_weight": torch.ones(11, 7)}, ValueError, "linear_weight must be [V,E] = [11, 8], got float32 [11, 7]"),
    ({"linear_weight": torch.ones(8)}, ValueError, "linear_weight [V,E], got float32 [2, 3, 8] on cpu and float32 [8]"),
    ({"linear_weight": torch.ones(11, 8).double()}, TypeError, "linear_weight must have input's dtype torch.float32"),
    ({"linear_weight": torch.ones(11, 8, device="meta")}, ValueError, "linear_weight must be on input's device cpu"),
    ({"target": [1]}, TypeError, "target must be a tensor, got list [1]"),
    ({"target": torch.ones(2, 3)}, TypeError, "target must hold class indices, got float32 [2, 3]"),
    ({"target": torch.ones(2, 3).bool()}, TypeError, "target must hold class indices, got bool [2, 3]"),
    ({"target": torch.ones(3).long()}, ValueError, "target must be [2, 3], got int64 [3]"),
    ({"target": torch.ones(2, 3, device="meta").long()}, ValueError, "target must be on input's device cpu, got int64"),
    ({"linear_bias": torch.ones(8)}, ValueError, "linear_bias must be [11], got float32 [8]"),
    ({"linear_bias": torch.ones(11).bfloat16()}, TypeError, "linear_bias must have input's dtype torch.float32"),
    ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none'; got 'max'"),
    ({"label_smoothing": 1.1}, ValueError, "label_smoothing must be a probability in [0, 1], got 1.1"),
    ({"z_loss": -0.1}, ValueError, "z_loss must not be negative, got -0.1"),
    ({"z_loss": float("nan")}, ValueError, "z_loss must be a finite number, got nan"),
    ({"softcap": -1.0}, ValueError, "softcap must not be negative, got -1.0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:48] for *_, m in BAD])
def test_bad_input(change, error, message):
    assert_rejects(ops.linear_cross_entropy, {**GOOD, **change}, error, message)
