"""A table of configurations that ``pytransformer tune`` measured on a machine: where it lies, and what it says.

One file an architecture, JSON, in the user's cache directory, or wherever ``PYTRANSFORMER_TRITON_TABLE`` points to.
It is read at the first launch of a kernel, never at import. What it does not name stays as ``_configs`` has it; tiles
decide the order in which numbers are added up, so with another table a result may differ in its last bits.

A table holds for the device and the Triton it was measured with. One in the cache directory that was measured with
others is left alone, and ``pytransformer info`` says so; one that was asked for by name must fit, or the call raises.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

VARIABLE = "PYTRANSFORMER_TRITON_TABLE"


class Config(NamedTuple):
    """A kernel's tile, the warps that share it, the stages of its loads' pipeline, and on NVIDIA's GPUs the most
    registers of a thread, 0 for as many as ptxas thinks best."""

    tile: tuple[int, ...]
    num_warps: int
    num_stages: int = 1
    registers: int = 0

    @property
    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


Choice = Config | bool
_C = TypeVar("_C", Config, bool)


@dataclass(frozen=True)
class Table:
    """What was measured on which device; ``choices`` by the keys of ``_configs``, ``milliseconds`` for the reader."""

    arch: str
    device: str
    triton: str
    choices: Mapping[str, Choice]
    milliseconds: Mapping[str, float] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the table; a reader sees the old one or the new one whole."""
        rows = {
            key: {
                **({"fused": choice} if isinstance(choice, bool) else choice._asdict()),
                "milliseconds": self.milliseconds.get(key),
            }
            for key, choice in sorted(self.choices.items())
        }
        found = {"arch": self.arch, "device": self.device, "triton": self.triton, "choices": rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_text(json.dumps(found, indent=1) + "\n")
        unfinished.replace(path)


def load(path: Path) -> Table:
    """The table in a file.

    Raises:
        ValueError: there is none, or it is not one that ``pytransformer tune`` wrote.
    """
    try:
        found = json.loads(path.read_text())
        rows = {key: (_choice(row), row.get("milliseconds")) for key, row in found["choices"].items()}
        return Table(
            *(str(found[name]) for name in ("arch", "device", "triton")),
            {key: choice for key, (choice, _) in rows.items()},
            {key: float(time) for key, (_, time) in rows.items() if time is not None},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no table of Triton configurations ({type(error).__name__}: {error}); "
            "`pytransformer tune` writes one"
        ) from error


def _choice(row: Mapping[str, Any]) -> Choice:
    if "fused" in row:
        if not isinstance(row["fused"], bool):
            raise ValueError(f"fused must be true or false, got {row['fused']!r}")
        return row["fused"]
    registers = row.get("registers", 0)
    numbers = (*row["tile"], row["num_warps"], row["num_stages"], registers)
    if not all(isinstance(n, int) and 0 <= n <= 2**16 for n in numbers):
        raise ValueError(f"a configuration must be of integers from 0 to 65536, got {dict(row)}")
    return Config(tuple(row["tile"]), row["num_warps"], row["num_stages"], registers)


def default_path(arch: str) -> Path:
    """Where the table of an architecture is written to, and looked for."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pytransformer" / f"triton-{arch}.json"


def mismatch(table: Table, arch: str) -> str | None:
    """Why the table does not hold here, or None."""
    here = {"arch": arch, "device": device_name(), "triton": version("triton")}
    for name, value in here.items():
        if getattr(table, name) != value:
            return f"it was measured with {name} {getattr(table, name)}, this is {value}"
    return None


def device_name() -> str:
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "none"


@cache
def in_use(arch: str) -> tuple[Table | None, str]:
    """The measured table that kernels for ``arch`` read, or None, and where that comes from, in words.

    Raises:
        ValueError: the file is no table, or the one that ``PYTRANSFORMER_TRITON_TABLE`` names does not hold here.
    """
    path, named = default_path(arch), bool(os.environ.get(VARIABLE))
    if not named and not path.exists():
        return None, "built in, not measured on this machine; `pytransformer tune` measures"
    table = load(path)
    reason = mismatch(table, arch)
    if reason is None:
        return table, f"{path}, {len(table.choices)} choices measured on this machine"
    if named:
        raise ValueError(f"{VARIABLE} names {path}, which does not hold here: {reason}")
    return None, f"built in; {path} is not used: {reason}"


@contextmanager
def built_in_only() -> Iterator[None]:
    """Leaves measured tables unread in the block."""
    global _read_tables
    outer, _read_tables = _read_tables, False
    try:
        yield
    finally:
        _read_tables = outer


_read_tables = True
_tried: dict[str, Choice] = {}


@contextmanager
def trying(choices: Mapping[str, Choice]) -> Iterator[None]:
    """Puts ``choices`` before every table in the block."""
    outer = dict(_tried)
    _tried.update(choices)
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(outer)


def chosen(arch: str, key: str, built_in: _C) -> _C:
    """The choice for ``key``: one that is being tried, a measured one, or the one built in."""
    found: Any = _tried.get(key)
    if found is None and _read_tables and (table := in_use(arch)[0]) is not None:
        found = table.choices.get(key)
    if found is None:
        return built_in
    if type(found) is not type(built_in) or (isinstance(found, Config) and len(found.tile) != len(built_in.tile)):
        raise ValueError(f"the table of Triton configurations for {arch} has {found} for {key!r}, unlike {built_in}")
    return found  # type: ignore[no-any-return]
