"""Who else has the cores: how long this process waited for one that others had, and when its own company is at rest.

By the scheduler's own account, in nanoseconds.

Linux counts, for each thread, the time that it was able to run and did not (schedstat's second field), and for
the whole machine the time that the hypervisor gave to other guests (steal, in ticks of 10 ms). Where neither
is to be read, nothing is ever found busy, and the environment of a run says so.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_TASKS = "/proc/self/task"
_PAUSE, _LONGEST_PAUSE = 0.0005, 0.5  # seconds


def waited_seconds() -> float:
    """Seconds that the threads of this process have waited so far; only differences mean something."""
    if not available():
        return 0.0
    return sum(map(_thread_waited, os.listdir(_TASKS))) * 1e-9 + _stolen_seconds()


def wait_for_rest() -> None:
    """Returns when no other thread of this process or its children is running, or after half a second.

    When a parallel region has ended, its threads wait for the next one in a loop, for milliseconds (GNU's OpenMP) up to
    200 of them (Intel's): on cores that belong to the peer whose turn it is.
    """
    end = time.perf_counter() + _LONGEST_PAUSE
    while available() and any(_running()) and time.perf_counter() < end:
        time.sleep(_PAUSE)


def _running() -> Iterator[bool]:
    """Of each other thread of this process and its children: is it running, or able to?"""
    own = str(threading.get_native_id())
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        try:
            threads = os.listdir(f"/proc/{process}/task")
        except OSError:  # it has ended
            continue
        for thread in threads:
            if thread != own:
                yield _state(process, thread) == b"R"


def _state(process: int | None, thread: str) -> bytes:
    try:
        with open(f"/proc/{process}/task/{thread}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1]
    except OSError:  # it has ended
        return b""


@cache
def available() -> bool:
    """Can it be read here?"""
    return Path(_TASKS, str(os.getpid()), "schedstat").exists()


def _thread_waited(thread: str) -> int:
    try:
        with open(f"{_TASKS}/{thread}/schedstat", "rb") as file:
            return int(file.read().split()[1])
    except OSError:  # the thread has ended
        return 0


def _stolen_seconds() -> float:
    with open("/proc/stat", "rb") as file:
        ticks = file.readline().split()
    return int(ticks[8]) / _ticks_a_second() if len(ticks) > 8 else 0.0


@cache
def _ticks_a_second() -> int:
    return os.sysconf("SC_CLK_TCK")
