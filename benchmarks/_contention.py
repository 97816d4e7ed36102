"""How long this process waited for a core that others had: by the scheduler's own account, in nanoseconds.

Linux counts, for each thread, the time that it was able to run and did not (schedstat's second field), and for
the whole machine the time that the hypervisor gave to other guests (steal, in ticks of 10 ms). Where neither
is to be read, nothing is ever found busy, and the environment of a run says so.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

_TASKS = "/proc/self/task"


def waited_seconds() -> float:
    """Seconds that the threads of this process have waited so far; only differences mean something."""
    if not available():
        return 0.0
    return sum(map(_thread_waited, os.listdir(_TASKS))) * 1e-9 + _stolen_seconds()


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
