"""The backend registry: which backend serves a call, and why the others do not.

A backend is a package with a module for each op it has kernels for. The module of op ``<op>`` holds pure
functions of one signature in all backends:

    <op>_fwd(*args) -> outputs        <op>_bwd(*args) -> gradients        why_not(*args) -> reason or None

and may hold <op>_inference(*args), the forward with None in place of what only a backward wants, and

    yields_to(*args) -> (backend, reason) or None

which names the backend that is faster at a call that both could serve. The package holds ``unavailable() -> reason or
None``. Selection walks ``ORDER`` for the call's device and takes the first backend without a reason against it;
``reference`` comes last and has none. A backend asked for by name serves the call, be it the slower one, or raises
``BackendError`` with the reason: nothing falls back silently. ``why_not`` and ``yields_to`` look at types, dtypes,
shapes and devices of tensors and at the other arguments, never at strides, places in memory or values: their answers
hold for every call of the same signature (``ops._op.recall``).
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch

from pytransformer.backends._tracing import constant_when_traced

# Backends by device type, best first. `reference` runs everywhere.
ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
PACKAGES = {
    "cuda": "pytransformer.backends.cuda",
    "triton": "pytransformer.backends.triton",
    "cpu": "pytransformer.backends.cpu",
    "reference": "pytransformer.reference",
}
OPS = ("attention", "layer_norm", "ffn", "linear", "linear_cross_entropy", "embedding")


class BackendError(ValueError):
    """A backend that was asked for by name cannot serve the call; the message says why."""


@dataclass(frozen=True)
class Decision:
    """One call's selection: the backend that ran, and the reason against each one before it.

    Of a step before a call (``note``): how it was done, and why not in another way.
    """

    op: str
    backend: str
    reasons: dict[str, str] = field(default_factory=dict)


class _State(threading.local):
    """What ``use_backend`` and ``record_decisions`` set, for each thread; torch.compile guards on it."""

    forced: str = "auto"
    decisions: list[Decision] | None = None


_state = _State()
_loaded: dict[tuple[str, str], ModuleType] = {}  # what `implementation` found


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes ``name`` the backend of every op in the block that does not name one itself.

    Raises:
        ValueError: ``name`` is neither a backend nor ``"auto"``.
    """
    _check_name(name)
    outer, _state.forced = _state.forced, name
    try:
        yield
    finally:
        _state.forced = outer


@contextmanager
def record_decisions() -> Iterator[list[Decision]]:
    """Collects the selection of every op called in the block."""
    decisions: list[Decision] = []
    outer, _state.decisions = _state.decisions, decisions
    try:
        yield decisions
    finally:
        _state.decisions = outer


def note(step: str, how: str, reasons: dict[str, str]) -> None:
    """Puts a step that no backend was chosen for among the decisions."""
    _record(step, how, reasons)


def settled() -> str | None:
    """What ``use_backend`` says; None while decisions are recorded, each of which is wanted."""
    return _state.forced if _state.decisions is None else None


def select(op: str, device_type: str, backend: str, args: tuple[Any, ...], obstacle: str | None = None) -> str:
    """The name of the backend that serves ``op`` for ``args``.

    Args:
        op: the op's name.
        device_type: where the tensors are.
        backend: ``"auto"`` or a backend's name.
        args: the op's arguments, as ``<op>_fwd`` takes them.
        obstacle: a reason against every fused backend that lies outside ``args``.

    Raises:
        BackendError: the named backend cannot serve the call.
    """
    name = backend if backend != "auto" else _state.forced
    if name == "auto":
        return _select_first(op, device_type, args, obstacle)
    _check_name(name)
    reason = why_not(name, op, device_type, args, obstacle)
    if reason is not None:
        raise BackendError(f"{op}: backend {name!r} cannot serve this call: {reason}")
    _record(op, name, {})
    return name


def _select_first(op: str, device_type: str, args: tuple[Any, ...], obstacle: str | None) -> str:
    reasons: dict[str, str] = {}
    for name in ORDER.get(device_type, ("reference",)):
        reason = why_not(name, op, device_type, args, obstacle)
        reason = reason or _why_rather_not(name, op, device_type, args, obstacle)
        if reason is None:
            _record(op, name, reasons)
            return name
        reasons[name] = reason
    raise AssertionError("the reference serves every call")


def why_not(name: str, op: str, device_type: str, args: tuple[Any, ...], obstacle: str | None = None) -> str | None:
    """Why backend ``name`` cannot serve this call, or None."""
    if name == "reference":
        return None
    if name not in ORDER.get(device_type, ()):
        return f"it has no kernels for tensors on {device_type!r}"
    reason = unavailable(name) or obstacle
    if reason is not None:
        return reason
    if not has_op(name, op):
        return f"it has no {op} kernel yet"
    result: str | None = _loaded[name, op].why_not(*args)
    return result


def _why_rather_not(name: str, op: str, device_type: str, args: tuple[Any, ...], obstacle: str | None) -> str | None:
    """Why a call that ``name`` could serve is left to a backend that can serve it too, or None."""
    if name == "reference" or not hasattr(_loaded[name, op], "yields_to"):
        return None
    found: tuple[str, str] | None = _loaded[name, op].yields_to(*args)
    if found is None or why_not(found[0], op, device_type, args, obstacle) is not None:
        return None
    return found[1]


# A traced call takes what the next two functions return as constants: what is installed does not change.
# (The mark must be the outermost decorator, so the caches stand on functions of their own.)


@constant_when_traced
def unavailable(name: str) -> str | None:
    """Why backend ``name`` does not work on this machine at all, or None."""
    return _unavailable(name)


@constant_when_traced
def has_op(name: str, op: str) -> bool:
    """Does backend ``name`` have kernels for ``op``? Loads its module if so, where the backend works."""
    if unavailable(name) is not None:
        return importlib.util.find_spec(f"{PACKAGES[name]}.{op}") is not None
    _load_all()
    return implementation(name, op) is not None


@cache
def _load_all() -> None:
    """All modules of the backends that work, at once: a tracer reads ``_loaded`` when it first meets it, and would miss
    what a later op of the same trace loads."""
    for name in PACKAGES:
        for op in OPS if _unavailable(name) is None else ():
            implementation(name, op)


@cache
def _unavailable(name: str) -> str | None:
    if name == "reference":
        return None
    reason: str | None = importlib.import_module(PACKAGES[name]).unavailable()
    return reason


@cache
def implementation(name: str, op: str) -> ModuleType | None:
    """The module of backend ``name`` with the functions of ``op``, or None where it has none."""
    path = f"{PACKAGES[name]}.{op}"
    if importlib.util.find_spec(path) is None:
        return None
    module = importlib.import_module(path)
    _loaded[name, op] = module
    return module


def _record(op: str, backend: str, reasons: dict[str, str]) -> None:
    if not torch.compiler.is_compiling() and _state.decisions is not None:
        _state.decisions.append(Decision(op, backend, reasons))


def _check_name(name: str) -> None:
    if name not in PACKAGES and name != "auto":
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, PACKAGES))}; got {name!r}")
