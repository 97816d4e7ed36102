"""How each kernel is cut, by architecture and shape class. Nothing is timed at first use.

A configuration is looked up by the kernel's name and a shape class: the dtype's width and whatever size decides
(a head dim, a row's length), rounded up, so that no length of a batch or sequence makes a kernel compile anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """A kernel's tile, the warps that share it, and the stages of its loads' pipeline."""

    tile: tuple[int, ...]
    num_warps: int
    num_stages: int = 1

    @property
    def options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


INTERPRETER = "interpreter"
# Rows longer than this are read in pieces.
WHOLE_ROW = 8192


def layer_norm(direction: str, width: int, arch: str) -> Config:
    """``(rows, columns)`` of a tile for rows of ``width`` elements.

    About 2,048 elements a tile, so that each thread has 16 to 32 in flight; the backward carries three column sums
    beside them in registers and takes half as many. The interpreter is fast on large tiles only.
    """
    columns = min(power_of_2(width), WHOLE_ROW)
    elements = 8192 if arch == INTERPRETER else 2048 if direction == "fwd" else 1024
    rows = min(max(1, elements // columns), 64)  # beyond that one row's column sums would be long chains
    return Config((rows, columns), num_warps=min(max(rows * columns // 512, 4), 16))


def power_of_2(n: int, least: int = 16) -> int:
    """``n`` rounded up to a power of two, at least ``least``."""
    return max(1 << (max(n, 1) - 1).bit_length(), least)


def architecture(device: torch.device) -> str:
    """The column of the tables that ``device`` reads."""
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8 and minor == 0:
        return "sm80"
    return {8: "sm86", 9: "sm90", 10: "sm100"}.get(major, "sm86")  # 99 KiB of shared memory everywhere else
