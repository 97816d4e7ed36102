"""Where a run was made: everything that its figures may hang on, and the machine's own limits."""

from __future__ import annotations

import math
import os
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pytransformer import _info
from pytransformer.backends import cpu as cpu_backend
from pytransformer.backends import unavailable

GEMM_SIZE = 1024
COPY_MEBIBYTES = (1, 4, 16, 64, 256)  # read and written together, so half of it each way


def environment() -> dict[str, Any]:
    """CPU, versions, commit, threads, instruction set, load."""
    commit, dirty = _commit()
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _info.cpu_model(),
        "cpu_features": _info.cpu_features(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu_backend.isa() if unavailable("cpu") is None else None,
        "versions": _info.versions(),
        "commit": commit,
        "dirty": dirty,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout that this package is imported from, and whether it has changes."""
    root = Path(_info.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None, None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit, bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def peaks(quick: bool = False) -> dict[str, Any]:
    """What this machine reaches: operations a second by dtype, and bytes copied a second by size.

    The rate of operations is that of the best of several large matrix products by torch: a floor of the true
    peak, and ``_table`` raises it where a row of this library goes beyond. Bytes are counted both ways. Rows
    that fit in a cache are held against copies of their own size, not against the memory.
    """
    seconds = 0.1 if quick else 0.4
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype), torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype)
        rates[name] = 2 * GEMM_SIZE**3 / _best(partial(torch.mm, a, b), seconds)
    rates["bfloat16"] = max(rates.values())
    copies = {}
    for size in COPY_MEBIBYTES:
        source = torch.ones(size * 2**20 // 8)
        target = torch.empty_like(source)
        copies[str(size * 2**20)] = size * 2**20 / _best(partial(target.copy_, source), seconds)
    return {"operations": rates, "operations_source": f"torch.mm {GEMM_SIZE}^3", "copy": copies}


def copy_rate(copies: dict[str, float], moved: float) -> float:
    """The rate of the copy whose size is nearest to ``moved`` bytes."""
    nearest = min(copies, key=lambda size: abs(math.log(float(size) / max(moved, 1))))
    return copies[nearest]


def _best(run: Callable[[], Any], seconds: float) -> float:
    """The shortest of the runs that fit in ``seconds``, three at least."""
    run()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)
