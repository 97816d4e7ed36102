"""Work in a process of its own: peaks of memory, and peers that cannot share a process with torch's OpenMP.

A child is started fresh (spawned, not forked: an OpenMP runtime does not survive a fork), builds the case's
tensors from the case itself, and answers over a pipe. A sample is timed inside the child, when the parent asks
for it, so peers of both kinds take turns in the same rounds.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from pytransformer.benchmarks._case import AbsentError, Case
from pytransformer.benchmarks._timing import Local, Sample

START_SECONDS = 300.0  # an engine may compile a whole model first


class Child:
    """A spawned process that runs ``target(connection, *arguments)`` with its output silenced."""

    def __init__(self, target: Callable[..., None], *arguments: Any, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_child, args=(other, target, threads, *arguments), daemon=True)
        outer = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)  # runtimes read it when they are loaded
        try:
            self.process.start()
        finally:
            if outer is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = outer
        other.close()

    def answer(self) -> Any:
        """The child's next message.

        Raises:
            AbsentError: it says why it cannot, it died, or it has been silent for ``START_SECONDS``.
        """
        try:
            if not self.pipe.poll(START_SECONDS):
                raise AbsentError(f"its process has not answered for {START_SECONDS:.0f} s")
            kind, value = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(1)
            raise AbsentError(f"its process ended with code {self.process.exitcode}") from error
        if kind == "absent":
            raise AbsentError(value)
        return value

    def ask(self, *message: Any) -> Any:
        self.pipe.send(message)
        return self.answer()

    def close(self) -> None:
        with suppress(OSError):
            self.pipe.close()  # the child's loop ends with its pipe
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def in_child(function: Callable[..., Any], case: Case, threads: int) -> Any:
    """``function(case)`` in a process of its own.

    Raises:
        AbsentError: it raised, and this is what.
    """
    child = Child(_once, function, case, threads=threads)
    try:
        return child.answer()
    finally:
        child.close()


class Remote:
    """A peer in a process of its own, as a provider.

    Raises:
        AbsentError: the peer cannot serve the case; the message says why.
    """

    clock = "wall time"

    def __init__(self, provider: Callable[[Case], Callable[[], Any]], case: Case, threads: int) -> None:
        self.child = Child(_serve, provider, case, threads=threads)
        try:
            self.child.answer()
        except AbsentError:
            self.child.close()
            raise

    def __call__(self) -> Any:
        return torch.load(io.BytesIO(self.child.ask("call")))

    def sample(self, calls: int) -> Sample:
        return Sample(*self.child.ask("sample", calls))

    def close(self) -> None:
        self.child.close()


def _child(pipe: Connection, target: Callable[..., None], threads: int, *arguments: Any) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        with suppress(OSError, ValueError):
            os.dup2(silent, stream.fileno())
    torch.set_num_threads(threads)
    try:
        target(pipe, *arguments)
    except AbsentError as reason:
        pipe.send(("absent", str(reason)))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return
    except Exception as error:  # the parent says so in the row
        first = (str(error).splitlines() or [""])[0]
        pipe.send(("absent", f"{type(error).__name__}: {first}"))


def _once(pipe: Connection, function: Callable[[Case], Any], case: Case) -> None:
    pipe.send(("value", function(case)))


def _serve(pipe: Connection, provider: Callable[[Case], Callable[[], Any]], case: Case) -> None:
    run = Local(provider(case))
    pipe.send(("value", None))
    while True:
        message = pipe.recv()
        if message[0] == "sample":
            pipe.send(("value", tuple(run.sample(message[1]))))
        else:
            buffer = io.BytesIO()
            torch.save(run(), buffer)
            pipe.send(("value", buffer.getvalue()))
