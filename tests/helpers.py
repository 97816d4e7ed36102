"""What the op tests share: one judged call, repeated calls, and tables of bad input."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import compare
import pytest
import torch
from torch import Tensor
from torch.overrides import _pop_mode_temporarily

from pytransformer import backends, ops
from pytransformer._parity import alike

Tensors = Mapping[str, "Tensor | None"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the session of the Triton kernels
EMULATED = os.environ.get("PYTRANSFORMER_PTX") == "1"  # the session of the CUDA kernels on the PTX runner
ON_GPU = [
    name for name in ("cuda", "triton")
    if torch.cuda.is_available() and not (INTERPRETED or EMULATED) and backends.unavailable(name) is None
]  # fmt: skip


def skip_unless_served(backend: str, op: str) -> None:
    if not backends.has_op(backend, op):
        pytest.skip(f"backend {backend!r} has no {op} kernel yet")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def floating(tensors: Tensors) -> list[str]:
    return [name for name, x in tensors.items() if x is not None and x.is_floating_point()]


def run(op: str, tensors: Tensors, options: Mapping[str, Any], backend: str) -> dict[str, Tensor]:
    """Outputs of ``ops.<op>`` and the gradient ``d<name>`` of each floating tensor."""
    function = getattr(ops, op)
    with _plain_eager(), _products_of_their_operands(backend):
        return compare.results(lambda **xs: function(**xs, **options, backend=backend), tensors, floating(tensors))


@contextmanager
def _products_of_their_operands(backend: str) -> Iterator[None]:
    """torch's products stand in for a GPU's where its kernels run without one. On CPUs with AMX those of bfloat16
    multiply what lies between the rows of an operand with zeros, and the tests poison it with NaN."""
    over_cpu_tensors = backend in ("triton", "cuda_emulated") and torch.cpu.get_capabilities().get("amx_bf16")
    if not over_cpu_tensors:
        yield
        return
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _plain_eager() -> Any:
    """Leaves the mode that puts a test's tensors on the GPU, which an op would take another path under."""
    return _pop_mode_temporarily() if torch._C._len_torch_function_stack() else nullcontext()


def check(
    op: str,
    tensors: Tensors,
    options: Mapping[str, Any],
    backend: str,
    *,
    harmless: Tensors | None = None,
    magnitudes: Mapping[str, float] | None = None,
    luck: float = 1.0,
) -> dict[str, Tensor]:
    """Judges outputs and gradients of one call, and returns them; every failing one is in the message.

    ``harmless`` is what oracle and plain PyTorch get where ``tensors`` hide NaN behind a mask. The largest error
    of plain PyTorch over some hundred elements is a matter of luck: where it decides, plain is measured on a few
    more inputs of the same kind. ``luck`` times that is allowed to a case that was sought among thousands.
    """
    actual = run(op, tensors, options, backend)
    dtypes = {n: x.dtype for n, x in actual.items()}
    call = _Call.of(op, harmless or tensors, options, dtypes, magnitudes or {})
    wanted = _wanted(call)
    assert actual.keys() == wanted.keys()
    bounds = {n: compare.Allowed(*(luck * bound for bound in wanted[n][1])) for n in actual}
    found = {n: compare.judge(f"{op} {n}", x, wanted[n][0], bounds[n]) for n, x in actual.items()}
    failed = {n: c for n, c in found.items() if not c.ok}
    if failed and all(c.mismatch is None for c in failed.values()):
        loosest = _loosest(call)
        failed = {
            n: c for n, c in failed.items() if c.max_error > luck * loosest[n][0] or c.rms_error > luck * loosest[n][1]
        }
    assert not failed, "\n" + "\n".join(map(str, failed.values()))
    for name, x in tensors.items():
        if f"d{name}" in actual:
            assert actual[f"d{name}"].dtype == x.dtype, f"d{name} must have the dtype of {name}"
    return actual


@dataclass(frozen=True)
class _Call:
    """A call as the oracle sees it, whichever backend is judged: equal ones are computed once."""

    fingerprint: bytes
    op: str = field(compare=False)
    tensors: Tensors = field(compare=False)
    options: Mapping[str, Any] = field(compare=False)
    dtypes: Mapping[str, torch.dtype] = field(compare=False)  # of the results, where not plain PyTorch's
    magnitudes: Mapping[str, float] = field(compare=False)

    @classmethod
    def of(cls, *parts: Any) -> _Call:
        pickled = io.BytesIO()
        _Contents(pickled).dump(parts)
        return cls(hashlib.sha256(pickled.getvalue()).digest(), *parts)


class _Contents(pickle.Pickler):
    """Writes tensors of equal values alike; torch's own pickles name their addresses."""

    def reducer_override(self, x: object) -> Any:
        if not isinstance(x, Tensor):
            return NotImplemented
        values = x.detach().cpu().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
        return str, (f"{x.dtype}{list(x.shape)}", values.numpy().tobytes())


@lru_cache(maxsize=512)  # as many as one test has: of the next instruction set's cases each is found
def _wanted(call: _Call) -> dict[str, tuple[Tensor, compare.Allowed]]:
    """The float64 oracle's results, and what plain PyTorch's errors allow."""
    op, tensors, options = call.op, call.tensors, call.options
    wide = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in tensors.items()}
    expected = run(op, wide, options, "reference")
    spellings = [
        compare.results(lambda f=f, **xs: f(**xs, **options), tensors, floating(tensors))
        for f in compare.plain.spellings(op, options)
    ]

    def allowed(name: str) -> compare.Allowed:
        plain = [results[name] for results in spellings]
        dtype = call.dtypes.get(name, plain[0].dtype)
        return compare.allowed(expected[name], plain, dtype, magnitude=call.magnitudes.get(name, 0.0))

    return {name: (x, allowed(name)) for name, x in expected.items()}


@lru_cache(maxsize=512)
def _loosest(call: _Call) -> dict[str, tuple[float, float]]:
    """The most that plain PyTorch's results are allowed on other inputs of the same kind."""
    rest: tuple[Any, ...] = (call.options, {}, call.magnitudes)
    more = [_wanted.__wrapped__(_Call(b"", call.op, other, *rest)) for other in alike(call.tensors)]
    return {n: tuple(max(bounds) for bounds in zip(*(m[n][1] for m in more), strict=True)) for n in call.dtypes}


def assert_repeats(op: str, tensors: Tensors, options: Mapping[str, Any], backend: str) -> None:
    """The same bits, forward and backward, run after run."""
    first = run(op, tensors, options, backend)
    for _ in range(1 if INTERPRETED else 4):
        for name, x in run(op, tensors, options, backend).items():
            different = int((x != first[name]).sum())
            assert torch.equal(x, first[name]), f"{op} {name}: {different} of {x.numel()} elements differ between runs"


def assert_wanted_gradients_only(op: str, tensors: Tensors, options: Mapping[str, Any], backend: str) -> None:
    """One tensor requires a gradient at a time: it gets the one it gets with all of them, and no other gets any."""
    everything = run(op, tensors, options, backend)
    for wanted in floating(tensors):
        found = compare.results(
            lambda **xs: getattr(ops, op)(**xs, **options, backend=backend), tensors, [wanted]
        )  # fmt: skip
        torch.testing.assert_close(found[f"d{wanted}"], everything[f"d{wanted}"], msg=lambda m, n=wanted: f"d{n}: {m}")


def gradcheck(op: str, tensors: Tensors, options: Mapping[str, Any], *, twice: bool = True) -> None:
    """The reference of ``op`` in float64 against finite differences."""
    names = floating(tensors)
    leaves = [tensors[name].detach().double().requires_grad_() for name in names]

    def function(*xs: Tensor) -> Any:
        given = {**tensors, **dict(zip(names, xs, strict=True))}
        return getattr(ops, op)(**given, **options, backend="reference")

    assert torch.autograd.gradcheck(function, leaves)
    if twice:
        assert torch.autograd.gradgradcheck(function, leaves)


def assert_rejects(op: Callable[..., Any], arguments: Mapping[str, Any], error: type, message: str) -> None:
    with pytest.raises(error) as caught:
        op(**arguments)
    text = str(caught.value)
    assert text.startswith(f"{op.__name__}: "), text
    assert message in text, text
