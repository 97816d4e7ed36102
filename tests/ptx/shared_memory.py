"""The most dynamic shared memory that each kernel of the library is launched with.

The launchers decide it, so they are called, on the shapes that ask for the most; a launch is recorded and not run. What
a kernel can ask for at all its PTX says: it names an array of no size.
"""

from __future__ import annotations

import re
from typing import Any

import cuda_table
import torch
from torch import Tensor

from ptx import backend, build, emulator
from pytransformer import ops

WIDTHS = (32, 64, 96, 128, 192, 256)
COLUMNS = (255, 256, 512, 768, 4095, 8192)  # of each kernel of layer_norm's backward that keeps sums, the longest rows
_DYNAMIC = re.compile(r"^\.extern \.shared .*?(\w+)\[\];", re.M)


def largest() -> dict[str, int]:
    """Bytes, by the readable name of ``cuda_table``."""
    texts = [text for arch in build.ARCHS for text in backend.module().ptx[arch]]
    with emulator.recorded() as asked:
        for arch in build.ARCHS:
            with backend.installed(arch) as name:
                _launch_all(name)
    missing = {kernel for text in texts for kernel in _with_dynamic_memory(text)} - asked.keys()
    assert not missing, f"never launched: {missing}"
    kernels = {found[1] for text in texts for found in build.ENTRY.finditer(text)}
    names = cuda_table.readable(kernels)
    return {names[kernel]: asked.get(kernel, 0) for kernel in kernels}


def _launch_all(name: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        for width in WIDTHS:
            for queries, keys in ((8, 8), (1, 1024)):
                _attention(name, dtype, width, queries, keys)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for columns in COLUMNS:
            _layer_norm(name, dtype, columns)


def _with_dynamic_memory(text: str) -> list[str]:
    arrays = [rf"\b{re.escape(array)}\b" for array in _DYNAMIC.findall(text)]
    return [found[1] for found in build.ENTRY.finditer(text) if any(re.search(array, found[0]) for array in arrays)]


def _attention(name: str, dtype: torch.dtype, width: int, queries: int, keys: int) -> None:
    query, key, value = (torch.zeros(1, 1, n, width, dtype=dtype, requires_grad=True) for n in (queries, keys, keys))
    _differentiate(ops.attention(query, key, value, backend=name))


def _layer_norm(name: str, dtype: torch.dtype, columns: int) -> None:
    x = torch.zeros(2, columns, dtype=dtype, requires_grad=True)
    _differentiate(ops.layer_norm(x, x[0].detach().requires_grad_(), backend=name))


def _differentiate(result: Any) -> None:
    result = result if isinstance(result, Tensor) else result[0]
    result.sum().backward()
