"""Launches kernels on the runner, and says what its detectors found.

kernels = emulator.load(build.ptx_of(path, "80"))
with emulator.watch(races=True, seed=3) as findings:
    emulator.launch(kernels["scale"], grid=(4,), block=(128,), arguments=[x, y, 0.5, 512])
assert not findings, findings
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ptx import build
from ptx.translate import parse


@dataclass(frozen=True)
class Kernel:
    """A translated kernel: ``image`` is the runtime's handle, ``lines`` tells source and text of a PTX line."""

    name: str
    image: int
    lines: dict[int, tuple[str, str]]


@dataclass(frozen=True)
class Use:
    """What one instruction moved: wavefronts of shared memory, sectors of 32 bytes of a tensor."""

    kernel: str
    instruction: str
    space: str
    tensor: str  # of global memory
    bytes: int
    requests: int
    moved: int
    ideal: int


_known: dict[str, Kernel] = {}  # by name, for the lines in reports


@cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(build.runtime()), mode=ctypes.RTLD_GLOBAL)
    for name in ("ptx_report", "ptx_counts"):
        getattr(found, name).restype = ctypes.c_char_p
    found.ptx_add_tensor.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32]
    found.ptx_launch.argtypes = [ctypes.c_void_p] + [ctypes.c_void_p] * 2 + [ctypes.c_size_t, ctypes.c_void_p]
    return found


def translated(ptx: str, name: str) -> Kernel:
    library()  # the kernel's symbols are the runtime's
    path, lines = build.kernel(ptx, name)
    loaded = ctypes.CDLL(str(path))
    image = ctypes.addressof(ctypes.c_char.in_dll(loaded, "image"))
    _known[name] = Kernel(name, image, lines)
    return _known[name]


def load(ptx: str) -> dict[str, Kernel]:
    """All kernels of a PTX text, by name."""
    return {name: translated(ptx, name) for name in parse(ptx).kernels}


def add_tensor(name: str, x: torch.Tensor) -> None:
    """Allows kernels to touch the memory of ``x``; with none allowed, global memory is not checked."""
    if x.numel() == 0:
        return
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    size = x.element_size()
    library().ptx_add_tensor(name.encode(), x.data_ptr(), span * size, size)


def forget_tensors() -> None:
    library().ptx_forget_tensors()


def findings() -> list[str]:
    """What went wrong since the last ``clear``, one line for each kind and place."""
    text: str = library().ptx_report().decode()
    return [_with_sources(line) for line in text.splitlines()]


def clear() -> None:
    library().ptx_clear()


def uses() -> list[Use]:
    rows = (line.split("\t") for line in library().ptx_counts().decode().splitlines())
    return [
        Use(kernel, _known[kernel].lines.get(int(line), ("", ""))[1], space, tensor, *map(int, figures))
        for kernel, line, space, tensor, *figures in rows
    ]


class Findings(list[str]):
    """The lines of a report; printed one below the other."""

    def __repr__(self) -> str:
        return "\n" + "\n".join(self)


@contextmanager
def recorded() -> Iterator[dict[str, int]]:
    """Launches in the block are not run: the largest dynamic shared memory that each kernel was asked for, in bytes."""
    largest: dict[str, int] = {}

    def record(name: bytes, dynamic_bytes: int) -> None:
        largest[name.decode()] = max(largest.get(name.decode(), 0), dynamic_bytes)

    function = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_uint64)(record)
    library().ptx_set_recorder(function)
    try:
        yield largest
    finally:
        library().ptx_set_recorder(None)


@contextmanager
def watch(*, seed: int = 0, races: bool = False, counts: bool = False) -> Iterator[Findings]:
    """Sets the options for the block; the list it gives is filled at the end of the block."""
    found = Findings()
    clear()
    library().ptx_options(seed, int(races), int(counts))
    try:
        yield found
    finally:
        found += findings()
        library().ptx_options(0, 0, 0)


_TYPES_OF_MAPS = {  # CU_TENSOR_MAP_DATA_TYPE_*
    torch.uint8: 0, torch.int16: 1, torch.int32: 3, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9,
}  # fmt: skip


def tensor_map(x: torch.Tensor, box: Sequence[int], swizzle: int = 0) -> bytes:
    """The runner's tensor map of ``x`` for boxes of a shape, rows of ``swizzle`` bytes permuted; 0: none is.

    Raises:
        ValueError: there is no such map.
    """
    size = x.element_size()
    to = ctypes.create_string_buffer(128)
    sizes = (ctypes.c_uint64 * 5)(*reversed(x.shape))
    strides = (ctypes.c_uint64 * 5)(*(step * size for step in reversed(x.stride()[:-1])))
    boxes = (ctypes.c_uint32 * 5)(*reversed(box))
    base = ctypes.c_uint64(x.data_ptr())
    if library().ptx_encode_tensor_map(to, _TYPES_OF_MAPS[x.dtype], x.ndim, base, sizes, strides, boxes, swizzle or 16):
        raise ValueError(f"no tensor map of {list(x.shape)} with strides {x.stride()} for boxes of {list(box)}")
    return to.raw


def launch(
    kernel: Kernel,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Any],
    shared: int = 0,
    names: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Runs one kernel. Tensors are passed by address and are the only memory it may touch; int is 32 bits wide."""
    forget_tensors()
    tensors = names or {f"argument {i}": x for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)}
    for name, x in tensors.items():
        add_tensor(name, x)
    cells = [_argument(value) for value in arguments]
    pointers = (ctypes.c_void_p * max(len(cells), 1))(*(ctypes.addressof(cell) for cell in cells))
    sizes = [(ctypes.c_uint32 * 3)(*(*size, 1, 1)[:3]) for size in (grid, block)]
    library().ptx_launch(kernel.image, *sizes, shared, pointers)
    forget_tensors()


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_uint64(value.data_ptr())
    if isinstance(value, bytes):
        return ctypes.create_string_buffer(value, len(value))
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, int):
        return ctypes.c_int32(value)
    return value  # a ctypes object


def _with_sources(text: str) -> str:
    def replaced(match: re.Match[str]) -> str:
        kernel, line = _known.get(match[1]), int(match[2])
        if kernel is None or line not in kernel.lines:
            return f"line {line}" if line else "the end"
        source, instruction = kernel.lines[line]
        return f"{source or 'line'} (PTX line {line}: `{instruction}`)"

    return re.sub(r"\{([\w$]*):(\d+)\}", replaced, text)
