"""The runner's own kernels with arguments and what must come out: shared by the tests of right and of broken ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ptx import build, emulator

# Given a kernel, one launch or more; returns how far each result is from what it must be, relative to its tolerance.
Case = Callable[[emulator.Kernel], Mapping[str, float]]


def _off(found: Tensor, wanted: Tensor, tolerance: float) -> float:
    error = (found.double() - wanted.double()).abs().max().item()
    return error / tolerance if error == error else float("inf")


def axpy(kernel: emulator.Kernel) -> Mapping[str, float]:
    x, y = torch.randn(1000), torch.randn(1000)
    wanted = 2.5 * x + y
    emulator.launch(kernel, (8,), (128,), [x, y, 2.5, 1000])
    return {"y": _off(y, wanted, 1e-6)}


def row_sums(kernel: emulator.Kernel) -> Mapping[str, float]:
    x, sums = torch.randn(5, 300), torch.full((5,), torch.nan)
    emulator.launch(kernel, (5,), (128,), [x, sums, 300])
    return {"sums": _off(sums, x.double().sum(1), 1e-4)}


def last_block_sum(kernel: emulator.Kernel) -> Mapping[str, float]:
    x, finished, results = torch.randn(1000), torch.zeros(1, dtype=torch.int32), {}
    for i in range(2):  # the second launch finds the counter as the first has left it
        parts, total = torch.full((8,), torch.nan), torch.full((1,), torch.nan)
        emulator.launch(kernel, (8,), (128,), [x, parts, finished, total, 1000])
        results[f"total {i}"] = _off(total, x.double().sum(), 1e-4)
    return {**results, "counter": float(finished.item())}


def hand_over(kernel: emulator.Kernel) -> Mapping[str, float]:
    rounds = 7
    x = torch.arange(32 * rounds, dtype=torch.int32)
    y = torch.full_like(x, -1)
    emulator.launch(kernel, (1,), (64,), [x, y, rounds])
    return {"y": _off(y.view(rounds, 32), x.view(rounds, 32).roll(-1, 1), 0.5)}


def matmul(kernel: emulator.Kernel, K: int = 96) -> Mapping[str, float]:
    M, N = 64, 128
    A, B = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16()
    C = torch.full((M, N), torch.nan)
    emulator.launch(kernel, (N // 64, M // 64), (128,), [A, B, C, N, K])
    return {"C": _off(C, A.double() @ B.double(), 1e-4)}


def column_sums(kernel: emulator.Kernel) -> Mapping[str, float]:
    rows, columns = 171, 56
    x, sums = torch.randint(0, 1000, (rows, columns), dtype=torch.int16), torch.full((128,), -1, dtype=torch.int32)
    map = emulator.tensor_map(x, (32, 64), swizzle=128)
    emulator.launch(kernel, (1,), (160,), [map, sums, rows], names={"x": x, "sums": sums})
    wanted = torch.nn.functional.pad(x, (0, 64 - columns)).sum(0)
    return {"sums": _off(sums.view(2, 64).sum(0), wanted, 0.5)}


def add_matrices(kernel: emulator.Kernel) -> Mapping[str, float]:
    count, rows = 5, 70
    out, matrices = torch.randn(rows, 32), torch.randn(count, rows, 32)
    wanted = out.double() + matrices.double().sum(0)
    arguments = [emulator.tensor_map(out, (32, 32), swizzle=128), matrices, count, rows]
    emulator.launch(kernel, (3,), (128,), arguments, names={"out": out, "matrices": matrices})
    return {"out": _off(out, wanted, 1e-5)}


CASES: dict[str, tuple[str, Case]] = {
    "axpy": ("basics.cu", axpy),
    "row_sums": ("basics.cu", row_sums),
    "last_block_sum": ("basics.cu", last_block_sum),
    "hand_over": ("basics.cu", hand_over),
    "matmul": ("matmul.cu", matmul),
    "matmul_warpgroup": ("warpgroup.cu", partial(matmul, K=256)),
    "column_sums": ("bulk.cu", column_sums),
    "add_matrices": ("bulk_add.cu", add_matrices),
}
HOPPER_ALONE = ("warpgroup.cu", "bulk.cu", "bulk_add.cu")  # instructions of compute capability 9.0


def source(file: str) -> str:
    return (build.HERE / "kernels" / file).read_text()
