"""Where a run was made: everything that its figures may hang on."""

from __future__ import annotations

import os
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from pytransformer import _info
from pytransformer.backends import cpu as cpu_backend
from pytransformer.backends import unavailable
from pytransformer.benchmarks import _contention

_CPU = Path("/sys/devices/system/cpu/cpu0")


def environment() -> dict[str, Any]:
    """CPU, GPU, clocks, versions, commit, threads, instruction set, load."""
    commit, dirty = _commit()
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _info.cpu_model(),
        "cpu_features": _info.cpu_features(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "megahertz": _clocks(),
        "caches": _caches(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "isa": cpu_backend.isa() if unavailable("cpu") is None else None,
        "versions": _info.versions(),
        "commit": commit,
        "dirty": dirty,
        "load": load(),
        "contention_seen": _contention.available(),
    }


def load() -> float | None:
    """How many processes wanted a core over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _clocks() -> dict[str, float]:
    """The clock now, and its bounds where the system tells them."""
    found = {}
    now = _info.cpu_megahertz()
    if now is not None:
        found["now"] = now
    for name in ("min", "max"):
        text = _text(_CPU / "cpufreq" / f"cpuinfo_{name}_freq")
        if text:
            found[name] = int(text) / 1e3
    return found


def _caches() -> dict[str, str]:
    """Each level's size, as the system spells it."""
    found = {}
    for folder in sorted((_CPU / "cache").glob("index*")):
        if _text(folder / "type") != "Instruction":
            found[f"L{_text(folder / 'level')}"] = _text(folder / "size")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


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
