"""The ops inside PyTorch: library checks, compile, export, functorch, autocast, checkpoint, fake tensors."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers import randn
from torch.utils.checkpoint import checkpoint

from pytransformer import backends, ops
from pytransformer.ops._op import FusedOp
from pytransformer.ops.attention import UNPACKED

RNG = torch.tensor([3, 1])


def library(op) -> FusedOp:
    return importlib.import_module(f"pytransformer.ops.{op}")._op


def served(op):
    return ["reference", *(["cpu"] if backends.unavailable("cpu") is None and backends.has_op("cpu", op) else [])]


# Arguments of each op's forward as its library op takes them, without the backend.
def layer_norm_args():
    return (randn(3, 8), randn(8), randn(8), randn(3, 8), randn(8), RNG, 0.3, 1e-5, False, True)


def attention_args():
    q, k, v = randn(2, 4, 5, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 8)
    mask = (torch.rand(2, 1, 1, 6) < 0.8).expand(2, 4, 5, 6)
    return (q, k, v, mask, randn(1, 4, 1, 6), torch.tensor([6, 4]), None, -3, 2, 0.3, 0.0, 0.0, None, *UNPACKED)


def ffn_args():
    return (randn(2, 3, 8), randn(12, 8), randn(12), randn(6, 12), randn(6), None, None, RNG, "gelu", 0.2, True)


def linear_args():
    return (randn(2, 3, 8), randn(12, 8), randn(12))


def linear_cross_entropy_args():
    return (
        randn(2, 3, 8),
        randn(11, 8),
        randn(11),
        torch.randint(0, 11, (2, 3)),
        "mean",
        -100,
        0.1,
        0.01,
        5.0,
        [True] * 3,
    )


def embedding_args():
    tokens = torch.randint(0, 11, (2, 3))
    return (tokens, randn(11, 8), randn(3, 8), tokens % 2, randn(2, 8), RNG, 2.0, 0.2)


ARGS = {
    "attention": attention_args,
    "layer_norm": layer_norm_args,
    "ffn": ffn_args,
    "linear": linear_args,
    "linear_cross_entropy": linear_cross_entropy_args,
    "embedding": embedding_args,
}
CASES = [(op, backend) for op in backends.OPS for backend in served(op)]
each = pytest.mark.parametrize(("op", "backend"), CASES, ids=["-".join(c) for c in CASES])


def leaves(args):
    return tuple(
        x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args
    )


@each
def test_opcheck_forward(op, backend):
    torch.library.opcheck(library(op).library_forward, (*ARGS[op](), backend))
    torch.library.opcheck(library(op).library_forward, (*leaves(ARGS[op]()), backend))


@each
def test_opcheck_backward(op, backend):
    fused, args = library(op), ARGS[op]()
    outputs = fused._forward(*args, backend)
    saved, extra = fused.save(args, outputs)
    grads = tuple(torch.randn_like(y) for y in outputs[: fused.differentiable_outputs])
    needs = tuple(isinstance(x, torch.Tensor) and x.is_floating_point() for x in args)
    arguments = fused.backward_args(saved, extra, grads, needs)
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused.library_backward, (*arguments, backend), test_utils=utilities)


@each
def test_library_op_equals_the_public_path(op, backend):
    """Through the dispatcher and directly: the same bits, forward and backward."""
    fused, args = library(op), ARGS[op]()
    found = []
    for call in (fused.library_forward, fused.function.apply):
        tensors = leaves(args)
        y = call(*tensors, backend)[0]
        y.sum().backward()
        found.append([y, *(x.grad for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


# The public functions of a few tensors.
def public(op, backend):
    x, w1, w2 = randn(6, 8), randn(12, 8), randn(8, 12)
    q, k, v = randn(2, 4, 5, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 8)
    tokens = torch.randint(0, 12, (6,))
    keep = torch.rand(2, 1, 1, 6) < 0.8
    calls = {
        "layer_norm": (
            lambda x, w, b, r: ops.layer_norm(x, w, b, r, prenorm=True, dropout_p=0.2, seed=1, backend=backend),
            (x, randn(8), randn(8), randn(6, 8)),
        ),
        "attention": (
            lambda q, k, v: ops.attention(q, k, v, keep, is_causal=True, enable_gqa=True, backend=backend),
            (q, k, v),
        ),
        "ffn": (
            lambda x, w1, w2: ops.ffn(x, w1, None, w2, None, "silu", dropout_p=0.2, seed=1, backend=backend),
            (x, w1, w2),
        ),
        "linear": (lambda x, w, b: ops.linear(x, w, b, backend=backend), (x, w1, randn(12))),
        "linear_cross_entropy": (
            lambda x, w: ops.linear_cross_entropy(x, w, tokens, label_smoothing=0.1, backend=backend),
            (x, w1),
        ),
        "embedding": (
            lambda w, p: ops.embedding(tokens, w, p, dropout_p=0.1, seed=1, backend=backend),
            (w1, randn(6, 8)),
        ),
    }
    return calls[op]


def outputs_and_grads(function, args):
    tensors = [x.detach().clone().requires_grad_() for x in args]
    y = function(*tensors)
    y = y if isinstance(y, tuple) else (y,)
    grads = torch.autograd.grad(sum(a.square().sum() for a in y), tensors)
    return [*(a.detach() for a in y), *grads]


@each
def test_compile_fullgraph(op, backend):
    torch._dynamo.reset()
    function, args = public(op, backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(outputs_and_grads(compiled, args), outputs_and_grads(function, args), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("op", ["layer_norm"])
def test_compile_inductor(op):
    torch._dynamo.reset()
    function, args = public(op, "auto")
    compiled = torch.compile(lambda *xs: function(*(2 * x for x in xs)), fullgraph=True)
    wanted = outputs_and_grads(lambda *xs: function(*(2 * x for x in xs)), args)
    for actual, expected in zip(outputs_and_grads(compiled, args), wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["attention", "ffn"])
def test_compile_dynamic_shapes(op):
    torch._dynamo.reset()
    backend = "auto"
    if op == "ffn":
        w1, w2 = randn(12, 8), randn(8, 12)
        function = lambda x: ops.ffn(x, w1, None, w2, None, backend=backend)  # noqa: E731
        shapes = ((3, 8), (5, 8), (9, 8))
    else:
        function = lambda x: ops.attention(x, x, x, is_causal=True, window=3, backend=backend)  # noqa: E731
        shapes = ((2, 2, 5, 8), (2, 2, 7, 8), (2, 2, 12, 8))
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in shapes:
        x = randn(*shape)
        torch.testing.assert_close(compiled(x), function(x))


@each
def test_export(op, backend):
    function, args = public(op, backend)

    class Module(torch.nn.Module):
        def forward(self, *xs):
            return function(*xs)

    program = torch.export.export(Module(), args)
    actual, wanted = program.module()(*args), function(*args)
    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("op", backends.OPS)
def test_vmap_and_grad(op):
    function, args = public(op, "auto")
    batches = [torch.stack([x, 2 * x]) for x in args]
    actual = torch.func.vmap(function)(*batches)
    wanted = [function(*(b[i] for b in batches)) for i in range(2)]
    wanted = [torch.stack(ys) for ys in zip(*wanted, strict=True)] if isinstance(actual, tuple) else torch.stack(wanted)
    torch.testing.assert_close(actual, tuple(wanted) if isinstance(actual, tuple) else wanted)

    def loss(*xs):
        y = function(*xs)
        return sum(a.square().sum() for a in (y if isinstance(y, tuple) else (y,)))

    grads = torch.func.grad(loss, argnums=tuple(range(len(args))))(*args)
    for g, x in zip(grads, args, strict=True):
        assert g.shape == x.shape
    torch.func.jvp(loss, args, args)


@each
def test_checkpoint(op, backend):
    function, args = public(op, backend)
    wanted = outputs_and_grads(function, args)
    actual = outputs_and_grads(lambda *xs: checkpoint(function, *xs, use_reentrant=False), args)
    for a, b in zip(actual, wanted, strict=True):
        assert torch.equal(a, b)


@each
def test_checkpoint_replays_an_unseeded_dropout(op, backend):
    if op in ("attention", "linear", "linear_cross_entropy"):
        pytest.skip("no dropout to replay")
    x, w = randn(6, 8), randn(8)
    table = {
        "layer_norm": lambda x, w: ops.layer_norm(x, w, dropout_p=0.5, backend=backend),
        "ffn": lambda x, w: ops.ffn(x, torch.diag(w), None, torch.eye(8), None, dropout_p=0.5, backend=backend),
        "embedding": lambda x, w: ops.embedding(torch.arange(6), x, w, dropout_p=0.5, backend=backend),
    }
    torch.manual_seed(7)
    wanted = outputs_and_grads(table[op], (x, w))
    torch.manual_seed(7)
    actual = outputs_and_grads(lambda *xs: checkpoint(table[op], *xs, use_reentrant=False), (x, w))
    for a, b in zip(actual, wanted, strict=True):
        assert torch.equal(a, b)


AUTOCAST = {"attention": torch.bfloat16, "ffn": torch.bfloat16, "linear": torch.bfloat16, "layer_norm": torch.float32}


@pytest.mark.parametrize(("op", "dtype"), AUTOCAST.items())
def test_autocast(op, dtype):
    function, args = public(op, "auto")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(*args)
        y = y[0] if isinstance(y, tuple) else y
        assert y.dtype == dtype
    tensors = [x.detach().clone().requires_grad_() for x in args]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(*tensors)
        loss = (y[0] if isinstance(y, tuple) else y).float().sum()
    loss.backward()
    assert all(x.grad.dtype == torch.float32 for x in tensors)


def test_autocast_loss_is_float32():
    function, args = public("linear_cross_entropy", "auto")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert function(*args).dtype == torch.float32


@pytest.mark.parametrize("op", backends.OPS)
def test_fake_and_meta_tensors(op):
    from torch._subclasses.fake_tensor import FakeTensorMode

    wanted = [(y.shape, y.dtype) for y in library(op)._forward(*ARGS[op](), "reference")]
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in ARGS[op]()]
        found = library(op).library_forward(*args, "cpu")
    assert [(y.shape, y.dtype) for y in found] == wanted
    args = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in ARGS[op]()]
    found = library(op).library_forward(*args, "cpu")
    assert [(y.shape, y.dtype) for y in found] == wanted


@pytest.mark.parametrize("op", backends.OPS)
def test_shapes_on_the_meta_device(op):
    function, args = public(op, "auto")
    wanted = [(y.shape, y.dtype) for y in outputs_and_grads(function, args)]
    with torch.device("meta"):
        function, args = public(op, "auto")
        found = outputs_and_grads(function, args)
    assert all(y.is_meta for y in found)
    assert [(y.shape, y.dtype) for y in found] == wanted


@each
def test_parameters_subclasses_and_inference_mode(op, backend):
    function, args = public(op, backend)
    wanted = function(*args)
    torch.testing.assert_close(function(*(torch.nn.Parameter(x) for x in args)), wanted)
    with torch.inference_mode():
        torch.testing.assert_close(function(*args), wanted)

    class Sub(torch.Tensor):
        pass

    y = function(*(x.as_subclass(Sub) for x in args))
    y, wanted = (y[0], wanted[0]) if isinstance(y, tuple) else (y, wanted)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), wanted)


@each
def test_unused_and_retained_graphs(op, backend):
    function, args = public(op, backend)
    tensors = [x.clone().requires_grad_() for x in args]
    y = function(*tensors)
    y = y[0] if isinstance(y, tuple) else y
    first = torch.autograd.grad(y.sum(), tensors, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(y.sum(), tensors, allow_unused=True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
