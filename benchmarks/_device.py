"""Timing on a device: the host's clocks for a CPU, events and graph replay for a GPU.

A GPU runs behind the host: a call returns before its kernels have run. Events in the stream take the time on the
device. Where the call can be captured, a CUDA graph of it is replayed, so that the time is that of the kernels
and not of the host that launches them (the ``overhead`` suite has the host's); else the calls are launched one
by one between the events.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pytransformer.benchmarks._timing import Local, Sample

WARM_UP = 3  # calls before a capture: torch asks for it, and autotuners need it


def stream_of_its_own(device: str) -> AbstractContextManager[Any]:
    """In the block all work is on a stream that can be captured, which the default one cannot: a backward runs on the
    stream of its forward."""
    return nullcontext() if device == "cpu" else torch.cuda.stream(torch.cuda.Stream())


def local(run: Callable[[], Any], device: str) -> Local:
    """``run`` as a provider of this process."""
    return Local(run) if device == "cpu" else OnGpu(run)


class OnGpu(Local):
    """A callable whose work is on the GPU; captured at the first sample, after the check has run it."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(run)
        self._replay: Callable[[], Any] | None = None
        self.clock = "CUDA events"

    def sample(self, calls: int) -> Sample:
        if self._replay is None:
            self._replay = self._captured()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        cpu = time.process_time()
        begin.record()
        for _ in range(calls):
            self._replay()
        end.record()
        end.synchronize()
        return Sample(begin.elapsed_time(end) / 1e3, time.process_time() - cpu)

    def _captured(self) -> Callable[[], Any]:
        """The replay of a graph of one call, or the call itself where it cannot be captured."""
        for _ in range(WARM_UP):
            self.run()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self.run()
        except RuntimeError:  # it waits for the host, or allocates outside of torch
            torch.cuda.synchronize()
            return self.run
        self.clock = "CUDA events, graph replay"
        return graph.replay
