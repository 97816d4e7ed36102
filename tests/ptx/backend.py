"""The backend ``cuda_emulated``: the library's own adapters and host code, its kernels on the runner, CPU tensors.

``installed("80")`` loads a second copy of ``pytransformer.backends.cuda`` over the module that ``build.module`` makes,
and registers it for tensors on the CPU. Every call of a bound function tells the runner which tensors it was given,
by the names in ``_cuda.pyi``, so that a kernel may touch these and nothing else; what the detectors find is raised.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch

import pytransformer
from ptx import build, emulator
from pytransformer import backends

NAME = "cuda_emulated"
ADAPTERS = "pytransformer.backends.cuda"
CALL = ("device", "stream", "rng", "workspace", "counters")  # the parts of the argument `call`


class FaultyKernelError(AssertionError):
    """A kernel did what no kernel may: each line is one finding of the runner."""


class EmulatedModule(ModuleType):
    """``pytransformer._cuda`` whose functions run under the runner."""

    def __init__(self) -> None:
        super().__init__("pytransformer._cuda")
        emulator.library()
        path, self.ptx = build.module()
        loader = importlib.machinery.ExtensionFileLoader("_cuda", str(path))
        spec = importlib.util.spec_from_file_location("_cuda", str(path), loader=loader)
        assert spec is not None
        self.compiled = importlib.util.module_from_spec(spec)
        loader.exec_module(self.compiled)
        self.names = _parameter_names()
        self.arch = build.ARCHS[0]
        self.images: dict[tuple[str, str], int | None] = {}
        self.failure: Exception | None = None
        self.uses: list[emulator.Use] = []  # where these are counted
        self.finder = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(self._find)
        emulator.library().ptx_set_finder(self.finder)

    def use(self, arch: str) -> None:
        """Kernels launched from now on are those compiled for ``arch``."""
        self.arch = arch
        emulator.library().ptx_set_capability(int(arch.rstrip("a")))

    def _find(self, name: bytes) -> int | None:
        """Called by the stand-in runtime at a launch."""
        key = self.arch, name.decode()
        if key not in self.images:
            try:
                self.images[key] = emulator.translated(self._source(key[1]), key[1]).image
            except Exception as error:  # crosses C++: raised again when the call is back
                self.failure = error
                return None
        return self.images[key]

    def _source(self, name: str) -> str:
        for text in self.ptx[self.arch]:
            if f".entry {name}(" in text:
                return build.in_words_of_80(text)
        raise KeyError(f"no kernel {name} in the PTX for {self.arch}")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._watched(name, getattr(self.compiled, name))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            emulator.clear()  # a test of faults leaves kernels that never ended
            given = dict(_tensors(self.names.get(name, ()), args))
            for label, x in given.items():
                emulator.add_tensor(label, _whole(label, x, given))
            self.failure = None
            try:
                return function(*args)
            finally:
                emulator.forget_tensors()
                found = emulator.Findings(emulator.findings())
                self.uses += emulator.uses()
                emulator.clear()
                if self.failure is not None:
                    raise self.failure
                if found:
                    raise FaultyKernelError(f"{name} for sm_{self.arch}: {found!r}")

        return call


def _parameter_names() -> dict[str, tuple[str, ...]]:
    stub = build.ROOT / "pytransformer" / "_cuda.pyi"
    functions = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {node.name: tuple(argument.arg for argument in node.args.args) for node in functions}


def _tensors(names: tuple[str, ...], args: tuple[Any, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    for i, value in enumerate(args):
        parts = (
            zip(CALL, value, strict=False)
            if isinstance(value, tuple)
            else [(names[i] if i < len(names) else str(i), value)]
        )
        for name, part in parts:
            if isinstance(part, torch.Tensor):
                yield name, part


def _whole(name: str, x: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All rows of the tensor whose view ``x`` shows sequences that lie end to end as if each began at the first row."""
    ends = given.get("cu_seq_k" if name.removeprefix("grad_") in ("key", "value") else "cu_seq_q")
    if ends is None or x.dim() < 3:
        return x
    return x.detach().as_strided((1, x.shape[1], int(ends[-1]), *x.shape[3:]), x.stride())


@cache
def module() -> EmulatedModule:
    """The module, with the adapters over it under the name ``cuda_emulated.<op>``."""
    emulated = EmulatedModule()
    before = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith((ADAPTERS, "pytransformer._cuda"))
    }
    outer = pytransformer.__dict__.get("_cuda")
    package = backends.__dict__.get("cuda")
    pytransformer._cuda = sys.modules["pytransformer._cuda"] = emulated
    try:
        importlib.import_module(ADAPTERS)
        for op in backends.OPS:
            if importlib.util.find_spec(f"{ADAPTERS}.{op}") is not None:
                importlib.import_module(f"{ADAPTERS}.{op}")
        for name in [name for name in sys.modules if name.startswith(ADAPTERS)]:
            sys.modules[name.replace(ADAPTERS, NAME)] = sys.modules.pop(name)
    finally:
        del sys.modules["pytransformer._cuda"], pytransformer._cuda
        sys.modules.update(before)
        if outer is not None:
            pytransformer._cuda = outer
        if package is not None:
            backends.cuda = package
    return emulated


@contextmanager
def replaced(ptx: str) -> Iterator[None]:
    """Kernels launched in the block are taken from ``ptx`` where it has them: from an edited copy of the sources.

    What stands in an anonymous namespace has a made-up part in its name: here that of the library's file.
    """
    emulated = module()
    tags = _tags("".join(text for texts in emulated.ptx.values() for text in texts))
    for file, tag in _tags(ptx).items():
        ptx = ptx.replace(tag, tags.get(file, tag))
    outer = emulated.images, emulated.ptx
    emulated.images, emulated.ptx = {}, {arch: [ptx, *texts] for arch, texts in emulated.ptx.items()}
    try:
        yield
    finally:
        emulated.images, emulated.ptx = outer
        sys.modules[f"{NAME}._arguments"]._counters.clear()  # a broken kernel need not leave zeros


def _tags(ptx: str) -> dict[str, str]:
    """By file, how anonymous namespaces stand in names: their length and ``_GLOBAL__N__<hash>_<length>_<file>_...``."""
    found = re.finditer(r"(\d+)(?=_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?_cu)_)", ptx)
    return {start[2]: ptx[start.start() : start.end() + int(start[1])] for start in found}


@contextmanager
def installed(arch: str, *, seed: int = 0, races: bool = False, counts: bool = False) -> Iterator[str]:
    """Registers the backend for the block, and gives its name. What it counts is then in ``module().uses``."""
    module().use(arch)
    module().uses.clear()
    order, package = backends.ORDER["cpu"], {**backends.PACKAGES, NAME: NAME}
    outer, backends.PACKAGES = backends.PACKAGES, package
    backends.ORDER["cpu"] = (*order[:-1], NAME, order[-1])
    emulator.library().ptx_options(seed, int(races), int(counts))
    try:
        yield NAME
    finally:
        emulator.library().ptx_options(0, 0, 0)
        backends.PACKAGES, backends.ORDER["cpu"] = outer, order
