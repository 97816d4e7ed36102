"""The matrix product that ffn and linear_cross_entropy build on: one tile of A B, and the order tiles are visited in.

Tiles are taken in groups of eight rows of tiles, so that the programs that run at a time share their operands in the
L2 cache. Plain products are left to torch: its library is hard to beat where nothing is fused.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pytransformer.kernels import _configs
from pytransformer.kernels._common import dot, float32_precision, load, store

_GROUP = tl.constexpr(8)


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The row and column of this program's tile, in tiles."""
    n_rows, n_columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (_GROUP * n_columns)
    inside = tl.program_id(0) % (_GROUP * n_columns)
    height = tl.minimum(n_rows - group * _GROUP, _GROUP)
    return group * _GROUP + inside % height, inside // height


@triton.jit
def product_tile(
    a_ptr, b_ptr, m, n, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """float32 ``A[m, :] @ B[:, n]`` for rows m and columns n."""
    a_row, b_column = a_ptr + m.to(tl.int64)[:, None] * stride_am, b_ptr + n.to(tl.int64)[None, :] * stride_bn
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_row + k.to(tl.int64)[None, :] * stride_ak, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_column + k.to(tl.int64)[:, None] * stride_bk, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total += dot(a, b, PRECISION)
    return total


@triton.jit(do_not_specialize=["K"])
def accumulate_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``C += A B``, C float32 [M,N]. Columns of A are read up to a multiple of 16 rows: whole vectors for any M."""
    row, column = tile_of_program(M, N, BLOCK_M, BLOCK_N)
    m, n = row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    total = product_tile(
        a_ptr, b_ptr, m, n, tl.cdiv(M, 16) * 16, N, K, stride_am, stride_ak, stride_bk, stride_bn,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    mask = (m < M)[:, None] & (n < N)[None, :]
    at = c_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    store(at, load(at, mask) + total, mask)


def accumulate(c: Tensor, a: Tensor, b: Tensor) -> None:
    """``c += a @ b`` in float32, of operands in 16 bits or float32; c is contiguous.

    ``a`` is the transpose of rows that lie apart by a multiple of 16, with memory between them that can be read.
    """
    M, N = c.shape
    config = _configs.matmul("accumulate", a.dtype, _configs.architecture(a.device))
    block_m, block_n, block_k = config.tile
    accumulate_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
        a, b, c, M, N, a.shape[1], *a.stride(), *b.stride(),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PRECISION=float32_precision(), **config.options,
    )  # fmt: skip
