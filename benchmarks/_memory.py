"""Peak memory of a call beyond what was there before it: its outputs, what it saves and its workspace.

On a GPU torch's allocator tells. On a CPU the kernel does: the peak of the resident set is reset before the call
(/proc/self/clear_refs), after the heap and the CPU kernels have given back what they kept; so memory that C++ takes
counts like torch's.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pytransformer.backends import cpu, unavailable
from pytransformer.benchmarks._case import AbsentError

REPEATS = 3
_MMAP_THRESHOLD, _MMAP_BYTES = -3, 65536  # mallopt's: blocks above come from the system and go back to it


def peak_memory(run: Callable[[], Any], device: str) -> list[int]:
    """Bytes at the peak of a call, ``REPEATS`` times.

    Raises:
        AbsentError: this system does not tell.
    """
    measure = _cuda_peak if device == "cuda" else _resident_peak
    return [measure(run) for _ in range(REPEATS)]


def _cuda_peak(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del outputs
    return int(peak)


def _resident_peak(run: Callable[[], Any]) -> int:
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_THRESHOLD, _MMAP_BYTES)
        gc.collect()
        libc.malloc_trim(0)
        if unavailable("cpu") is None:
            cpu.empty_cache()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        outputs = run()
        peak = _status("VmHWM") - before
    except (OSError, AttributeError, KeyError) as error:
        raise AbsentError(f"this system does not tell a process its peak of memory ({error})") from error
    del outputs
    return max(peak, 0)


def _status(name: str) -> int:
    lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(dict(lines)[name].split()[0]) * 1024
