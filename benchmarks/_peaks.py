"""The machine's own limits, measured in the same run: operations a second by dtype, bytes copied a second by size.

Of a row that promises a fraction of the limit, it is timed again in each round, beside the row: machines that are
shared have good hours and bad ones.

The peak of a CPU is a loop of multiply-adds in registers on every thread (``csrc/cpu/peak.cpp``), or of products of
bfloat16 where the processor has them; of a GPU, the best of several large matrix products. torch's product of
two matrices is measured beside it: what a good library reaches. Bytes are counted both ways, and rows that fit
in a cache are held against copies of their own size, not against the memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pytransformer.backends import cpu as cpu_backend
from pytransformer.backends import unavailable
from pytransformer.benchmarks._device import local, stream_of_its_own
from pytransformer.benchmarks._timing import Local, Provider, Sample

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
COPY_MEBIBYTES = {"cpu": (1, 4, 16, 64, 256), "cuda": (16, 64, 256, 2048)}  # read and written, half of it each way
PEAK_SECONDS = 0.02
GPU_CALLS = 10  # in one measurement
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Peaks = dict[str, Any]


def peaks(device: str = "cpu", quick: bool = False) -> Peaks:
    """The rates of ``device``; each of ``operations`` with its source."""
    seconds = 0.1 if quick else 0.3
    rates, sources = _loops(seconds) if device == "cpu" else ({}, {})
    products = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        if device == "cpu" and dtype == torch.float16:
            continue  # no CPU kernel of torch or of this library multiplies in it; it is widened
        products[name] = _product(dtype, device, seconds)
        if products[name] > rates.get(name, 0.0):
            rates[name], sources[name] = products[name], f"torch.mm {GEMM_SIZE[device]}^3"
    for name in ("bfloat16", "float16"):  # what a processor does not multiply in, is widened
        if rates.get(name, 0.0) < rates["float32"]:
            rates[name], sources[name] = rates["float32"], sources["float32"]
    copies = {str(size * 2**20): _copy(size * 2**20, device, seconds) for size in COPY_MEBIBYTES[device]}
    return {"operations": rates, "sources": sources, "gemm": products, "copy": copies}


class Operations(Local):
    """A provider that takes as long as so many operations take in the loop of ``peaks``, on every thread."""

    def __init__(self, dtype: str, operations: float) -> None:
        super().__init__(self._measure)
        self._paired = dtype == "bfloat16" and cpu_backend.peak_rate(True, PEAK_SECONDS / 10) > 0
        self._operations, self._rate = operations, 0.0

    def _measure(self) -> None:
        self._rate = cpu_backend.peak_rate(self._paired, PEAK_SECONDS)

    def sample(self, calls: int) -> Sample:
        found = super().sample(1)
        return found._replace(wall=calls * self._operations / self._rate)


def limit(dtype: str, operations: float, moved: float, found: Peaks) -> Provider | None:
    """What a CPU's floor under a row takes at the moment, where it can be told; of ``found`` the nearer of the two."""
    if unavailable("cpu") is not None:
        return None
    arithmetic, traffic = floors(dtype, operations, moved, found)
    if arithmetic > traffic:
        return Operations(dtype, operations)
    source = torch.randn(int(moved) // 8)
    return Local(partial(torch.empty_like(source).copy_, source))


def _loops(seconds: float) -> tuple[dict[str, float], dict[str, str]]:
    """Loops of multiply-adds, and of products of bfloat16 where there are any: by AMX, or of pairs."""
    if unavailable("cpu") is not None:
        return {}, {}
    single, paired = (_best_rate(partial(cpu_backend.peak_rate, kind, PEAK_SECONDS), seconds) for kind in (False, True))
    isa = cpu_backend.isa()
    return {"float32": single, "bfloat16": paired}, {
        "float32": f"{isa} multiply-adds",
        "bfloat16": f"{isa} products",
    }


def _best_rate(rate: Callable[[], float], seconds: float) -> float:
    end = time.perf_counter() + seconds
    best = rate()
    while best > 0 and time.perf_counter() < end:
        best = max(best, rate())
    return best


def _product(dtype: torch.dtype, device: str, seconds: float) -> float:
    """Of random numbers: a GPU that multiplies equal ones draws less power, and runs faster than it does in use."""
    size = GEMM_SIZE[device]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _shortest(partial(torch.mm, a, b), device, seconds)


def _copy(size: int, device: str, seconds: float) -> float:
    source = torch.randn(size // 8, device=device)
    target = torch.empty_like(source)
    return size / _shortest(partial(target.copy_, source), device, seconds)


def _shortest(run: Callable[[], Any], device: str, seconds: float) -> float:
    """The shortest of the runs that fit in ``seconds``, three at least. On a GPU a run is the mean of several: the
    first waits for the host."""
    provider, calls = local(run, device), 1 if device == "cpu" else GPU_CALLS
    found: list[float] = []
    with stream_of_its_own(device):
        provider.sample(1)
        end = time.perf_counter() + seconds
        while len(found) < 3 or time.perf_counter() < end:
            found.append(provider.sample(calls).wall / calls)
    return min(found)


def floors(dtype: str, operations: float, moved: float, found: Peaks) -> tuple[float, float]:
    """Seconds that no kernel goes below: operations over the peak rate, and bytes over the copy rate."""
    rates = found["operations"]
    return operations / rates.get(dtype, rates["float32"]), moved / copy_rate(found["copy"], moved)


def copy_rate(copies: dict[str, float], moved: float) -> float:
    """The rate of the copy whose size is nearest to ``moved`` bytes."""
    nearest = min(copies, key=lambda size: abs(math.log(float(size) / max(moved, 1))))
    return copies[nearest]
