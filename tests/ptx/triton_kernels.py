"""Kernels in Triton that the runner is tested with: what the library's own do not use."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product_of_boxes(a, b, c, K, BLOCK: tl.constexpr):
    """C = A B by descriptors of A [M,K], B [K,N] and C [M,N] in square tiles."""
    m0, n0 = tl.program_id(1) * BLOCK, tl.program_id(0) * BLOCK
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        total = tl.dot(a.load([m0, k]), b.load([k, n0]), total)
    c.store([m0, n0], total.to(c.dtype))
