"""Launches of Triton's kernels on the runner: the PTX that Triton compiles for a GPU, on CPU tensors.

    with on_the_runner("sm80"):
        kernels.layer_norm_fwd(x, ...)

Triton's compiler is another than nvcc's, with other instructions, layouts and pipelines: what agrees here was not made
to fit the runner. It also runs the library's Triton kernels as compiled, which their interpreter does not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

from ptx import emulator
from ptx.translate import parse
from pytransformer.kernels import _configs, _offline

_CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float, "i1": ctypes.c_bool}
SCRATCH = 2  # Triton gives every kernel two pointers of its own: to global scratch and to a profile


@contextmanager
def on_the_runner(arch: str) -> Iterator[None]:
    """Runs the launches of the block, configured for ``arch``, one of ``_offline.TARGETS``."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in kwargs}
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        source = _offline.Launch(self, arguments, options).source()
        compiled = triton.compile(source, target=_offline.TARGETS[arch], options=options)
        grid = grid(arguments) if callable(grid) else grid
        types = {name: type for name, type in source.signature.items() if type != "constexpr"}
        values = [_argument(arguments[name], type) for name, type in types.items()]
        names = {name: value for name in types if isinstance(value := arguments[name], torch.Tensor)}
        threads = 32 * compiled.metadata.num_warps
        kernel = _translated(compiled.asm["ptx"])
        values += [ctypes.c_uint64(0)] * SCRATCH
        emulator.launch(kernel, grid, (threads,), values, compiled.metadata.shared, names)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(_configs, "architecture", return_value=arch),
    ):
        yield


@cache
def _translated(ptx: str) -> emulator.Kernel:
    (name,) = parse(ptx).kernels
    return emulator.translated(ptx, name)


def _argument(value: Any, type: str) -> Any:
    return value if type.startswith("*") else _CTYPES[type](value)


def launch_with_descriptors(
    kernel: Any, grid: tuple[int, int], described: Sequence[torch.Tensor], numbers: Sequence[int], block: int = 64
) -> None:
    """Runs a kernel, compiled for Hopper, whose first arguments are descriptors of bfloat16 matrices in square tiles.

    A descriptor is a tensor map, with the swizzle that the compiled kernel asks for, then sizes and strides.
    """
    names = kernel.arg_names
    types = [f"tensordesc<bf16[{block},{block}]>" for _ in described] + ["i32" for _ in numbers]
    signature = dict(zip(names, types, strict=False)) | {names[-1]: "constexpr"}
    source = triton.compiler.ASTSource(kernel, signature, {names[-1]: block})
    compiled = triton.compile(source, target=_offline.TARGETS["sm90"], options={"num_stages": 3})
    values: list[Any] = []
    for x, meta in zip(described, compiled.metadata.tensordesc_meta, strict=True):
        values.append(emulator.tensor_map(x, meta["block_size"], 16 << meta["swizzle"]))
        values += [*x.shape, *map(ctypes.c_int64, x.stride())]
    values += [*numbers, *[ctypes.c_uint64(0)] * SCRATCH]
    tensors = dict(zip(names, described, strict=False))
    threads = 32 * compiled.metadata.num_warps
    emulator.launch(_translated(compiled.asm["ptx"]), grid, (threads,), values, compiled.metadata.shared, tensors)
