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
Call = tuple[int, int, "Tensor | None", "Tensor | None", Tensor]

_COUNTERS = 1024
_counters: dict[tuple[int, int], Tensor] = {}


def unsupported(x: Tensor) -> str | None:
    """Why no CUDA kernel takes a tensor of this dtype on this device, or None."""
    return unsupported_dtype(x) or (_old_device(x.device.index or 0) if x.is_cuda else None)


@cache
def _old_device(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    return None if capability >= OLDEST else too_old(capability)


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


def call(like: Tensor, rng: Tensor | None = None, workspace: Tensor | None = None, counters: int = _COUNTERS) -> Call:
    """Where and how to run a kernel: on the device of ``like``, on its current stream.

    ``workspace`` is scratch memory of the size the kernel asks for; ``counters`` is how many zeros the kernel counts
    its blocks in.
    """
    device, current = like.device.index or 0, stream(like)
    return device, current, rng, workspace, _zeros(like, current, counters)


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
        found = _counters[key] = torch.zeros(max(count, _COUNTERS), dtype=torch.int32, device=like.device)
    return found
