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
        """The answer to a message; raises as ``answer`` does."""
        with suppress(OSError):  # where the child is gone, the answer says so
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
    """A peer in a process of its own, as a provider of one case after the other."""

    clock = "wall time"

    def __init__(self, provider: Callable[[Case], Callable[[], Any]], threads: int) -> None:
        self.child = Child(_serve, provider, threads=threads)

    def take(self, case: Case) -> None:
        """Makes the calls below those of ``case``.

        Raises:
            AbsentError: the peer cannot serve it; the message says why.
        """
        self.child.ask("take", case)

    def __call__(self) -> Any:
        return torch.load(io.BytesIO(self.child.ask("call")))

    def sample(self, calls: int) -> Sample:
        return Sample(*self.child.ask("sample", calls))

    def alive(self) -> bool:
        return self.child.process.is_alive()

    def close(self) -> None:
        self.child.close()


def reason_of(error: Exception) -> str:
    """An exception in one line; what an adapter says by itself needs no type."""
    first = next(iter(str(error).splitlines()), "")
    return first if isinstance(error, AbsentError) else f"{type(error).__name__}: {first}"


def _child(pipe: Connection, target: Callable[..., None], threads: int, *arguments: Any) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        with suppress(OSError, ValueError):
            os.dup2(silent, stream.fileno())
    torch.set_num_threads(threads)
    try:
        target(pipe, *arguments)
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return
    except Exception as error:  # the parent says so in the row
        pipe.send(("absent", reason_of(error)))


def _once(pipe: Connection, function: Callable[[Case], Any], case: Case) -> None:
    pipe.send(("value", function(case)))


def _serve(pipe: Connection, provider: Callable[[Case], Callable[[], Any]]) -> None:
    run = Local(lambda: None)
    while True:
        kind, *rest = pipe.recv()
        try:
            if kind == "take":
                run, answer = Local(provider(rest[0])), None
            elif kind == "sample":
                answer = tuple(run.sample(rest[0]))
            else:
                buffer = io.BytesIO()
                torch.save(run(), buffer)
                answer = buffer.getvalue()
        except Exception as error:  # of this case; the next one may do
            pipe.send(("absent", reason_of(error)))
        else:
            pipe.send(("value", answer))
