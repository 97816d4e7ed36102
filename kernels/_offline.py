"""Compiles what a call would launch, for a GPU that is not here.

    with recorded("sm90") as launches:
        layer_norm.layer_norm_fwd(torch.empty(4096, 768, dtype=torch.bfloat16, device="meta"), ...)
    for launch in launches:
        print(launch.name, launch.compile("sm90"))

The call is a real one over tensors without memory: what is compiled is the kernel, the configuration and the
specialisation of arguments that the call would take on that GPU. Triton's wheel brings ptxas and cuobjdump, so this
needs no driver and no toolkit.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from pytransformer.kernels import _configs, _table

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes that one program may take.
SHARED_MEMORY = {"sm80": 166912, "sm86": 101376, "sm90": 232448, "sm100": 232448, "gfx942": 65536}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
_DTYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Figures:
    """What a compiled kernel takes: registers of a thread, bytes of its stack (spills), shared memory of a program."""

    registers: int
    stack: int
    shared: int


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def compile(self, arch: str) -> Figures:
        """Compiles for ``arch``, one of ``TARGETS``."""
        target = TARGETS[arch]
        compiled = triton.compile(self.source(), target=target, options=self.options)
        if target.backend == "hip":
            return _figures_of_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)
        return _figures_of_cubin(compiled.asm["cubin"], compiled.metadata.shared)

    def ir(self, arch: str) -> str:
        """Triton's own IR, before any pass."""
        from triton._C.libtriton import ir

        target, context = TARGETS[arch], ir.context()
        backend = make_backend(target)
        ir.load_dialects(context)
        backend.load_dialects(context)
        options = backend.parse_options(dict(self.options))
        codegen = backend.get_codegen_implementation(options)
        return str(self.source().make_ir(target, options, codegen, backend.get_module_map(), context))

    def source(self) -> ASTSource:
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments.get(parameter.name)
            free = not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = f"*{_DTYPES[value.dtype]}"
                aligned = True
            elif isinstance(value, float):
                signature[parameter.name], aligned = "fp32", False
            else:
                signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                aligned = free and value % 16 == 0
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)


@contextmanager
def recorded(arch: str) -> Iterator[list[Launch]]:
    """Collects the launches of the block, configured for ``arch``, instead of running them."""
    launches: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        launches.append(Launch(self, dict(zip(self.arg_names, args, strict=False)) | kwargs, options))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(_configs, "architecture", return_value=arch),
        _table.built_in_only(),
    ):
        yield launches


def _figures_of_cubin(cubin: bytes, shared: int) -> Figures:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def number(key: str) -> int:
        found = re.search(rf"{key}:(\d+)", text)
        assert found is not None, text
        return int(found[1])

    return Figures(number("REG"), number("STACK") + number("LOCAL"), shared)


def _figures_of_amdgcn(text: str, shared: int) -> Figures:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        assert found is not None, key
        return int(found[1])

    return Figures(number("vgpr_count"), number("private_segment_fixed_size"), shared)
