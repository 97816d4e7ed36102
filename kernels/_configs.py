"""How each kernel is cut, by architecture and shape class. Nothing is timed at first use.

A configuration is looked up by the kernel's name and a shape class: the dtype's width and whatever size decides
(a head dim, a row's length), rounded up, so that no length of a batch or sequence makes a kernel compile anew.

What stands here was chosen by compiling: none of the rows of ``docs/triton-kernels.txt`` spills. What is marked so was
timed on an H200 (torch 2.11, Triton 3.6, bfloat16), the rest was not: where a GPU is at hand, ``pytransformer tune``
measures, and its table (``_table``) goes before this one.
"""

from __future__ import annotations

from functools import cache

import torch

from pytransformer.kernels._table import Config, chosen

INTERPRETER = "interpreter"


def whole_row(direction: str, dtype: torch.dtype, arch: str) -> int:
    """The longest row that layer_norm holds in registers; a longer one is read in pieces.

    The backward's column sums leave no registers for rows of 8,192 in 32 bits, or, as compiled for sm_100, in any.
    """
    short = direction == "bwd" and arch != INTERPRETER and (dtype.itemsize == 4 or arch == "sm100")
    return 4096 if short else 8192


def layer_norm(direction: str, dtype: torch.dtype, width: int, arch: str) -> Config:
    """``(rows, columns)`` of a tile for rows of ``width`` elements.

    About 2,048 elements a tile, so that each thread has 16 to 32 in flight; the backward carries three column sums
    beside them in registers and takes half as many. The interpreter is fast on large tiles only.
    """
    whole = width <= whole_row(direction, dtype, arch)
    if arch == INTERPRETER:
        columns = power_of_2(width) if whole else 4096
        return Config((min(max(1, 8192 // columns), 64), columns), num_warps=4)
    columns = power_of_2(width) if whole else 2048
    elements = 2048 if direction == "fwd" else 1024
    rows = min(max(1, elements // columns), 64)  # beyond that one row's column sums would be long chains
    built_in = Config((rows, columns), num_warps=min(max(rows * columns // 512, 4), 16))
    if arch == "sm90" and whole:
        built_in = _LAYER_NORM_SM90[direction].get(columns, built_in)
        if dtype.itemsize == 4 or width % 16 > 0:  # rows of single elements take more registers
            built_in = built_in._replace(num_stages=1, registers=0)
    return chosen(arch, f"layer_norm {direction} {f'E={columns}' if whole else 'in pieces'}", built_in)


# Tiles timed on an H200, before the next rows were asked for early (the second stage): with several rows a tile the
# backward took four and five times as long at 512 and 256. The registers say how many programs a multiprocessor holds.
_LAYER_NORM_SM90 = {
    "fwd": {
        256: Config((16, 256), 4, 2, 128),
        512: Config((2, 512), 4, 2, 64),
        1024: Config((1, 1024), 4, 2, 64),
        2048: Config((1, 2048), 8, 2, 64),
        4096: Config((1, 4096), 8, 2, 128),
        8192: Config((1, 8192), 16, 2, 128),
    },
    "bwd": {
        256: Config((1, 256), 1, 2, 112),
        512: Config((1, 512), 1, 2, 128),
        1024: Config((1, 1024), 2, 2, 144),
        2048: Config((1, 2048), 4, 2, 168),
        4096: Config((1, 4096), 16, 2, 128),
        8192: Config((1, 8192), 16, 1, 128),  # two stages spill
    },
}


# (queries, keys) of a tile, by architecture, kernel, 16 or 32 bits, and head dim up to 64, 128 or 256. The rich tiles
# serve calls with a bias, dropout or a soft cap, which take registers of their own, and calls with a bool mask over
# heads wider than 128. docs/triton-kernels.txt shows that none spills.
_Attention = dict[str, dict[tuple[int, int], Config]]
_PLAIN: dict[str, _Attention] = {
    "sm80": {
        "fwd": {
            (16, 64): Config((128, 64), 8, 3),
            (16, 128): Config((64, 64), 4, 2),
            (16, 256): Config((64, 64), 8, 2),
        },
        "dq": {
            (16, 64): Config((64, 32), 4, 2),
            (16, 128): Config((64, 32), 8, 2),
            (16, 256): Config((32, 32), 8, 1),
        },
        "dkv": {
            (16, 64): Config((32, 128), 8, 2),
            (16, 128): Config((64, 64), 8, 2),
            (16, 256): Config((32, 32), 8, 1),
        },
    },
    "sm90": {  # head dims up to 128 timed on an H200, causal, at 4,096 tokens
        "fwd": {
            (16, 64): Config((64, 64), 4, 3, 168),
            (16, 128): Config((64, 64), 4, 3),
            (16, 256): Config((64, 32), 8, 2),
        },
        "dq": {
            (16, 64): Config((64, 32), 4, 3, 128),
            (16, 128): Config((128, 64), 8, 3, 255),
            (16, 256): Config((16, 32), 4, 1),
        },
        "dkv": {
            (16, 64): Config((64, 64), 4, 3),
            (16, 128): Config((32, 128), 8, 2),
            (16, 256): Config((32, 32), 8, 1),
        },
    },
    "sm100": {
        "fwd": {
            (16, 64): Config((128, 64), 8, 3),
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
    "gfx942": {
        "fwd": {
            (16, 64): Config((128, 64), 4),
            (16, 128): Config((64, 64), 4),
            (16, 256): Config((64, 32), 4),
        },
        "dq": {
            (16, 64): Config((64, 32), 4),
            (16, 128): Config((64, 32), 4),
            (16, 256): Config((32, 32), 4),
        },
        "dkv": {
            (16, 64): Config((32, 64), 4),
            (16, 128): Config((32, 32), 4),
            (16, 256): Config((16, 32), 4),
        },
    },
}
_RICH: dict[str, _Attention] = {
    "sm80": {
        "fwd": {
            (16, 64): Config((64, 32), 4, 2),
            (16, 128): Config((64, 64), 8, 1),
            (16, 256): Config((64, 32), 8, 2),
            (32, 64): Config((32, 32), 8, 1),
            (32, 128): Config((32, 16), 8, 1),
            (32, 256): Config((32, 16), 8, 1),
        },
        "dq": {
            (16, 64): Config((64, 32), 4, 2),
            (16, 128): Config((32, 32), 4, 2),
            (16, 256): Config((16, 32), 8, 2),
            (32, 64): Config((32, 32), 8, 1),
            (32, 128): Config((32, 16), 8, 1),
            (32, 256): Config((16, 16), 8, 1),
        },
        "dkv": {
            (16, 64): Config((32, 32), 4, 1),
            (16, 128): Config((32, 64), 8, 1),
            (16, 256): Config((16, 32), 8, 1),
            (32, 64): Config((32, 32), 8, 1),
            (32, 128): Config((16, 32), 8, 1),
            (32, 256): Config((16, 16), 8, 1),
        },
    },
    "sm90": {  # chosen by how much their loops issue for a score, in 16 bits
        "fwd": {
            (16, 64): Config((128, 64), 8, 2),
            (16, 128): Config((128, 32), 8, 1),
            (16, 256): Config((32, 32), 8, 1),
            (32, 64): Config((32, 32), 8, 1),
            (32, 128): Config((16, 32), 8, 1),
            (32, 256): Config((16, 16), 8, 1),
        },
        "dq": {
            (16, 64): Config((64, 32), 4, 1),
            (16, 128): Config((64, 16), 4, 1),
            (16, 256): Config((16, 32), 8, 2),
            (32, 64): Config((64, 32), 8, 1),
            (32, 128): Config((16, 16), 8, 1),
            (32, 256): Config((16, 32), 8, 1),
        },
        "dkv": {
            (16, 64): Config((32, 128), 8, 1),
            (16, 128): Config((32, 32), 8, 1),
            (16, 256): Config((32, 32), 8, 1),
            (32, 64): Config((32, 16), 8, 1),
            (32, 128): Config((16, 32), 8, 1),
            (32, 256): Config((16, 16), 8, 1),
        },
    },
    "sm100": {
        "fwd": {
            (16, 64): Config((64, 64), 8, 2),
            (16, 128): Config((64, 64), 8, 2),
            (16, 256): Config((64, 32), 8, 1),
            (32, 64): Config((16, 32), 8, 1),
            (32, 128): Config((16, 32), 8, 1),
            (32, 256): Config((16, 16), 8, 1),
        },
        "dq": {
            (16, 64): Config((64, 64), 8, 1),
            (16, 128): Config((64, 64), 8, 1),
            (16, 256): Config((64, 32), 8, 1),
            (32, 64): Config((32, 32), 8, 1),
            (32, 128): Config((16, 16), 8, 1),
            (32, 256): Config((16, 32), 8, 1),
        },
        "dkv": {
            (16, 64): Config((32, 64), 8, 2),
            (16, 128): Config((32, 32), 8, 1),
            (16, 256): Config((16, 64), 8, 2),
            (32, 64): Config((32, 16), 8, 1),
            (32, 128): Config((16, 32), 8, 1),
            (32, 256): Config((16, 16), 8, 1),
        },
    },
    "gfx942": {
        "fwd": {
            (16, 64): Config((64, 32), 4),
            (16, 128): Config((64, 32), 4),
            (16, 256): Config((32, 32), 4),
            (32, 64): Config((32, 32), 4),
            (32, 128): Config((32, 16), 4),
            (32, 256): Config((32, 16), 4),
        },
        "dq": {
            (16, 64): Config((64, 32), 4),
            (16, 128): Config((32, 32), 4),
            (16, 256): Config((32, 32), 4),
            (32, 64): Config((32, 32), 4),
            (32, 128): Config((16, 16), 4),
            (32, 256): Config((16, 16), 4),
        },
        "dkv": {
            (16, 64): Config((32, 32), 4),
            (16, 128): Config((32, 32), 4),
            (16, 256): Config((16, 32), 4),
            (32, 64): Config((32, 32), 4),
            (32, 128): Config((16, 16), 4),
            (32, 256): Config((16, 16), 4),
        },
    },
}
# Where a plain tile has no room for a bool mask, in 16 bits.
_MASKED = {
    ("sm80", "fwd", 128): Config((64, 64), 8, 2),
    ("sm80", "dq", 128): Config((32, 32), 4, 2),
    ("sm90", "fwd", 128): Config((128, 64), 8, 3),  # the plain one has with Triton 3.7, and not with 3.9
    ("sm90", "dkv", 128): Config((32, 128), 8, 3),
}
# Where an operand of wgmma has rows of 64 bytes, products on Hopper come out wrong or read beyond shared memory, with
# Triton 3.6 and 3.7 (triton-lang/triton issue 11366; seen on an H200). A tile's rows are longer there.
_NARROWEST_HEAD = {("sm90", 16): 64}


@cache
def head_tile(head_dim: int, dtype: torch.dtype, arch: str) -> int:
    """Columns of the tiles that hold heads of this size."""
    return power_of_2(head_dim, _NARROWEST_HEAD.get((arch, 8 * dtype.itemsize), 16))


_DECODE = {
    (16, 64): Config((64,), 4, 2),
    (16, 128): Config((64,), 4, 2),
    (16, 256): Config((32,), 4, 2),
    (32, 64): Config((32,), 8, 2),
    (32, 128): Config((32,), 8, 1),
    (32, 256): Config((16,), 8, 1),
}
_INTERPRETED_TILE = Config((64, 64), 4)


def attention(kernel: str, dtype: torch.dtype, head_dim: int, call: str, arch: str) -> Config:
    """``(queries, keys)`` of a tile of the kernels ``"fwd"``, ``"dq"`` and ``"dkv"``, ``(keys,)`` of ``"decode"``.

    ``call`` is ``attention.shape_class``: "plain", "masked" or "rich". In 32 bits all calls are taken as rich.
    """
    if arch == INTERPRETER:
        return Config((64,), 4) if kernel == "decode" else _INTERPRETED_TILE
    bits, size = 8 * dtype.itemsize, next(size for size in (64, 128, 256) if head_dim <= size)
    if kernel == "decode":
        return chosen(arch, f"attention decode {bits} bits D={size}", _DECODE[bits, size])
    wide_on_ampere = (arch, size) == ("sm86", 256)  # which has no memory for the plain tiles of sm80
    rich = call == "rich" or (call == "masked" and size == 256) or bits == 32 or wide_on_ampere
    tables, column = _RICH if rich else _PLAIN, arch if arch in _PLAIN else "sm80"
    built_in = tables[column][kernel][bits, size]
    if call == "masked" and not rich:
        built_in = _MASKED.get((column, kernel, size), built_in)
    return chosen(arch, f"attention {kernel} {bits} bits D={size} {'rich' if rich else call}", built_in)


# (rows, columns, depth) of a tile of a matrix product, by architecture, 16 or 32 bits, and the registers that a kernel
# takes: as many as one right operand, or two.
_OPERANDS = {"accumulate": 2, "hidden": 1, "gated": 2, "backward": 2}
_MATMUL: dict[str, dict[tuple[int, int], Config]] = {
    "sm80": {
        (16, 1): Config((128, 128, 32), 8, 4),
        (16, 2): Config((128, 64, 32), 8, 4),
        (32, 1): Config((64, 64, 32), 4, 2),
        (32, 2): Config((64, 32, 32), 4, 2),
    },
    "sm90": {
        (16, 1): Config((128, 64, 64), 8, 3),
        (16, 2): Config((128, 64, 32), 8, 4),
        (32, 1): Config((64, 64, 32), 4, 2),
        (32, 2): Config((64, 32, 32), 8, 2),
    },
}
# Of one kernel alone; timed on an H200, E = 1,024, as is Hopper's (16, 1) above. Gated was timed with 128 columns,
# which spill by now, accumulate before it copied vectors.
_MATMUL_OF = {
    ("sm90", "gated", 16): Config((128, 64, 64), 8, 3),
    ("sm90", "backward", 16): Config((128, 64, 64), 8, 3),
    ("sm90", "accumulate", 16): Config((128, 128, 64), 8, 3),
}
# Up to this width of the input the activation is fused with the product before it; `pytransformer tune` decides it
# for each width. Hopper's was timed on an H200: at 512 and 1,024 the fused kernel takes 1.3 times the time of torch's
# product and one pass behind it, and training through fused kernels 1.45 times that of plain PyTorch. The others were
# not measured here: set from what others report, that an unfused activation costs some 30, 20, 15 and 4% of the product
# at 512, 768, 1024 and 4096.
_FUSED_WIDTH = {"sm80": 2048, "sm86": 2048, "sm90": 0, "sm100": 768, "gfx942": 768, INTERPRETER: 64}


def matmul(kernel: str, dtype: torch.dtype, arch: str) -> Config:
    """``(rows, columns, depth)`` of a tile of a product with an epilogue.

    ``"accumulate"`` adds to what is there, ``"hidden"`` and ``"gated"`` are the first product of a feed-forward
    network, ``"backward"`` that of its backward, whose epilogue takes as many registers as a second operand.
    """
    if arch == INTERPRETER:
        return Config((64, 64, 64), 4)
    bits = 8 * dtype.itemsize
    of_operands = _MATMUL.get(arch, _MATMUL["sm80"])[bits, _OPERANDS[kernel]]
    built_in = _MATMUL_OF.get((arch, kernel, bits), of_operands)
    return chosen(arch, f"matmul {kernel} {bits} bits", built_in)


def fuse_activation(direction: str, dtype: torch.dtype, width: int, arch: str) -> bool:
    """Should an activation be fused with the product before it, whose inner dimension is ``width``?"""
    built_in = width <= _FUSED_WIDTH[arch]
    if arch == INTERPRETER:
        return built_in
    return chosen(arch, f"ffn fused {direction} {8 * dtype.itemsize} bits E={power_of_2(width)}", built_in)


def elementwise(arch: str) -> Config:
    """``(rows, columns)`` of a tile of an elementwise kernel."""
    if arch == INTERPRETER:
        return Config((64, 64), 4)
    return chosen(arch, "elementwise", Config((4, 512) if arch == "sm90" else (16, 128), 4))


def embedding(width: int, arch: str) -> Config:
    """``(rows, columns)`` of a tile of the embedding's kernels."""
    columns = min(power_of_2(width), 256)
    if arch == INTERPRETER:
        return Config((64, columns), 4)
    return chosen(arch, f"embedding E={columns}", Config((max(2048 // columns, 1), columns), 4))


def cross_entropy(classes: int, arch: str) -> Config:
    """``(rows, classes)`` of a tile of logits: on a GPU one row a program, and four running numbers a lane."""
    if arch == INTERPRETER:
        return Config((64, 64), 4)
    columns = min(power_of_2(classes), 4096)
    return chosen(arch, f"cross_entropy V={columns}", Config((1, columns), 8))


def power_of_2(n: int, least: int = 16) -> int:
    """``n`` rounded up to a power of two, at least ``least``."""
    return max(1 << (max(n, 1) - 1).bit_length(), least)


@cache
def l2_bytes(device: torch.device) -> int:
    """The size of a GPU's L2 cache; 50 MiB, an H100's, where there is none."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 50 * 2**20


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
