"""Kernels in Triton that the runner is tested with: what the library's own do not use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product_of_boxes(a, b, c_ptr, N, K, BLOCK: tl.constexpr):
    """C = A B, float32, by descriptors of A [M,K] and B [K,N] in square tiles; M and N are multiples of these."""
    m0, n0 = tl.program_id(1) * BLOCK, tl.program_id(0) * BLOCK
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        total = tl.dot(a.load([m0, k]), b.load([k, n0]), total)
    m, n = m0 + tl.arange(0, BLOCK), n0 + tl.arange(0, BLOCK)
    tl.store(c_ptr + m[:, None] * N + n[None, :], total)
