"""How the adapters hand tensors to the kernels, and what every kernel is told besides its tensors."""

from __future__ import annotations

from functools import cache
from typing import overload

import torch
from torch import Tensor

from pytransformer import _cuda
from pytransformer.backends._arguments import rows as contiguous_rows
from pytransformer.backends._arguments import unsupported_dtype
from pytransformer.backends.cuda import OLDEST, too_old

# (device, stream, rng, workspace, counters), the last argument of every function of _cuda: csrc/bindings/call.h.
Call = tuple[int, int, "Tensor | None", "Tensor | None", "Tensor | None"]

COUNTERS = 1024  # as many as a kernel whose blocks count in one place needs
_counters: dict[tuple[int, int], Tensor] = {}


def unsupported(x: Tensor) -> str | None:
    """Why no CUDA kernel takes a tensor of this dtype on this device, or None."""
    return unsupported_dtype(x) or (_old_device(x.device.index or 0) if x.is_cuda else None)


def _old_device(index: int) -> str | None:
    capability = _capability(index)
    return None if capability >= OLDEST else too_old(capability)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def outpaced(x: Tensor, work: int, least: int) -> tuple[str, str] | None:
    """The answer of ``yields_to`` on Hopper and Blackwell, whose tensor cores Triton uses in full and these kernels,
    written for Ampere, do not. Measured on an H200; of Blackwell it is taken to be so.

    A call of Triton's costs the host some 40 microseconds more, so that it has to be of at least so much ``work`` to
    gain by that; in a compiled graph, which must not hang on a length, any is.
    """
    if not x.is_cuda or _capability(x.device.index or 0)[0] not in (9, 10):
        return None
    if torch.compiler.is_compiling():
        return "triton", "in a compiled graph Triton's kernels are faster on this GPU"
    return ("triton", "of this size Triton's kernels are faster on this GPU") if work >= least else None


@overload
def aligned(x: Tensor) -> Tensor: ...
@overload
def aligned(x: Tensor | None) -> Tensor | None: ...
def aligned(x: Tensor | None) -> Tensor | None:
    """Contiguous and at a multiple of 16 bytes, where kernels load fastest; a copy only where it is not."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@overload
def rows(x: Tensor) -> Tensor: ...
@overload
def rows(x: Tensor | None) -> Tensor | None: ...
def rows(x: Tensor | None) -> Tensor | None:
    """[..., E] as aligned [rows, E]."""
    return aligned(contiguous_rows(x))


def call(like: Tensor, rng: Tensor | None = None, workspace: Tensor | None = None, counters: int = 0) -> Call:
    """Where and how to run a kernel: on the device of ``like``, on its current stream.

    ``workspace`` is scratch memory of the size the kernel asks for; ``counters`` is how many zeros the kernel counts
    its blocks in, if it does. In a graph that is captured they cost a launch.
    """
    device, current = like.device.index or 0, stream(like)
    return device, current, rng, workspace, _zeros(like, current, counters) if counters > 0 else None


@cache
def multiprocessors(device: int) -> int:
    """Of a device, by its index."""
    return _cuda.multiprocessors(device)


def stream(x: Tensor) -> int:
    """The current stream of the device of ``x``, as a pointer; 0 for a CPU tensor."""
    return int(torch._C._cuda_getCurrentRawStream(x.device.index)) if x.is_cuda else 0


def _zeros(like: Tensor, stream: int, count: int) -> Tensor:
    """int32 [at least count], all zero between kernels, of this stream alone.

    Kernels count their finished blocks here and leave zeros, so nothing has to be cleared before a launch. A graph
    that is being captured gets memory of its own: it may be replayed on any stream.
    """
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    key = (like.device.index or 0) if like.is_cuda else -1, stream
    found = _counters.get(key)
    if found is None or found.numel() < count:
        found = _counters[key] = torch.zeros(max(count, COUNTERS), dtype=torch.int32, device=like.device)
    return found
