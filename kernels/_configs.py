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
    columns = power_of_2(width) if width <= WHOLE_ROW else WHOLE_ROW // 2
    elements = 8192 if arch == INTERPRETER else 2048 if direction == "fwd" else 1024
    rows = min(max(1, elements // columns), 64)  # beyond that one row's column sums would be long chains
    return Config((rows, columns), num_warps=min(max(rows * columns // 512, 4), 16))


# (queries, keys) of a tile, by architecture, kernel, 16 or 32 bits, and head dim up to 64, 128 or 256. What stands
# under "rich" serves calls with a bool mask, a bias, dropout or a soft cap, which take registers of their own.
_Attention = dict[str, dict[tuple[int, int], Config]]
_PLAIN: dict[str, _Attention] = {
    "sm80": {
        "fwd": {
            (16, 64): Config((128, 64), 8, 3),
            (16, 128): Config((128, 64), 8, 3),
            (16, 256): Config((64, 64), 8, 2),
        },
        "dq": {
            (16, 64): Config((64, 64), 8, 2),
            (16, 128): Config((64, 64), 8, 2),
            (16, 256): Config((64, 32), 8, 1),
        },
        "dkv": {
            (16, 64): Config((64, 64), 8, 2),
            (16, 128): Config((32, 64), 8, 2),
            (16, 256): Config((32, 64), 8, 1),
        },
    },
    "sm90": {
        "fwd": {
            (16, 64): Config((128, 64), 4, 3),
            (16, 128): Config((128, 64), 8, 3),
            (16, 256): Config((64, 64), 8, 2),
        },
        "dq": {
            (16, 64): Config((128, 64), 8, 2),
            (16, 128): Config((64, 64), 8, 2),
            (16, 256): Config((64, 32), 8, 1),
        },
        "dkv": {
            (16, 64): Config((64, 128), 8, 2),
            (16, 128): Config((32, 128), 8, 2),
            (16, 256): Config((32, 64), 8, 1),
        },
    },
}
_RICH: dict[str, _Attention] = {
    "sm80": {
        "fwd": {
            (16, 64): Config((64, 64), 8, 2),
            (16, 128): Config((64, 64), 8, 2),
            (16, 256): Config((64, 32), 8, 1),
            (32, 64): Config((64, 32), 8, 1),
            (32, 128): Config((32, 32), 8, 1),
            (32, 256): Config((32, 32), 8, 1),
        },
        "dq": {
            (16, 64): Config((64, 64), 8, 2),
            (16, 128): Config((64, 32), 8, 1),
            (16, 256): Config((64, 32), 8, 1),
            (32, 64): Config((32, 32), 8, 1),
            (32, 128): Config((32, 32), 8, 1),
            (32, 256): Config((32, 32), 8, 1),
        },
        "dkv": {
            (16, 64): Config((32, 64), 8, 2),
            (16, 128): Config((32, 32), 8, 1),
            (16, 256): Config((32, 64), 8, 1),
            (32, 64): Config((32, 32), 8, 1),
            (32, 128): Config((32, 32), 8, 1),
            (32, 256): Config((32, 32), 8, 1),
        },
    },
}
_INTERPRETED_TILE = Config((64, 64), 4)


def attention(kernel: str, dtype: torch.dtype, head_dim: int, rich: bool, arch: str) -> Config:
    """``(queries, keys)`` of a tile of the kernels ``"fwd"``, ``"dq"``, ``"dkv"`` and ``"decode"`` (keys alone).

    ``rich`` calls have a bool mask, a bias, dropout or a soft cap; in 32 bits all calls are taken as rich.
    """
    if arch == INTERPRETER:
        return _INTERPRETED_TILE
    if kernel == "decode":
        return Config((0, 64 if head_dim <= 128 and dtype.itemsize == 2 else 32), 4, 2)
    size = next(size for size in (64, 128, 256) if head_dim <= size)
    tables = _RICH if rich or dtype.itemsize == 4 else _PLAIN
    return tables.get(arch, tables["sm80"])[kernel][8 * dtype.itemsize, size]


# (rows, columns, depth) of a tile of a matrix product, by architecture, 16 or 32 bits, and right operands (1, or 2
# with a gate).
_MATMUL: dict[str, dict[tuple[int, int], Config]] = {
    "sm80": {
        (16, 1): Config((128, 128, 32), 8, 4),
        (16, 2): Config((128, 64, 32), 8, 4),
        (32, 1): Config((64, 64, 32), 4, 2),
        (32, 2): Config((64, 32, 32), 4, 2),
    },
}
# Up to this width of the input the activation is fused with the product before it. Not measured on a GPU here: set
# from what others report, that an unfused activation costs some 30, 20, 15 and 4% of the product at 512, 768, 1024
# and 4096, and that on Hopper a product in Triton gives away about 10 to 15%.
_FUSED_WIDTH = {"sm80": 2048, "sm86": 2048, "sm90": 1024, "sm100": 768, "gfx942": 768, INTERPRETER: 64}


def matmul(dtype: torch.dtype, arch: str, operands: int = 1) -> Config:
    """``(rows, columns, depth)`` of a tile; ``operands`` counts the right operands that share a left one."""
    if arch == INTERPRETER:
        return Config((64, 64, 64), 4)
    return _MATMUL.get(arch, _MATMUL["sm80"])[8 * dtype.itemsize, operands]


def fuse_activation(width: int, arch: str) -> bool:
    """Should an activation be fused with the product before it, whose input has ``width`` columns?"""
    return width <= _FUSED_WIDTH[arch]


def elementwise(arch: str) -> Config:
    """``(rows, columns)`` of a tile of an elementwise kernel."""
    return Config((64, 64) if arch == INTERPRETER else (16, 128), 4)


def embedding(width: int, arch: str) -> Config:
    """``(rows, columns)`` of a tile of the embedding's kernels."""
    columns = min(power_of_2(width), 256)
    return Config((64, columns) if arch == INTERPRETER else (max(2048 // columns, 1), columns), 4)


def cross_entropy(classes: int, arch: str) -> Config:
    """``(rows, classes)`` of a tile of logits: on a GPU one row a program, and four running numbers a lane."""
    if arch == INTERPRETER:
        return Config((64, 64), 4)
    return Config((1, min(power_of_2(classes), 4096)), 8)


def logits_rows(rows: int, row_bytes: int, arch: str) -> int:
    """Rows of logits that are stored at a time: 128 MiB, enough to fill a GPU with a product's tiles."""
    if arch == INTERPRETER:
        return 32
    chunks = -(-rows * row_bytes // 2**27)
    return -(-rows // max(chunks, 1))


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
