"""Token, position and segment embeddings, scaled and dropped out, in one pass; a deterministic backward.

    y = dropout(scale * weight[tokens] + positions + segment_weight[segments])

The forward moves a row of the table and of y once for each token, and positions that all sequences share once for
sixteen of them. The backward must add up the rows of dy that share a token. Atomics would do it in any order; here
the tokens are sorted first (N indices, little beside N rows), so that the rows of one token are a segment of the
sorted order. A program owns some columns of one row of the table, adds up the rows of its segment in that order and
writes the row, zeros where no token asked for it: dy is read once for each table and the gradient written once.
Tables of a few rows have long segments, which several programs share; their partial sums are added up in order.
Dropout is drawn again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pytransformer.kernels import _configs
from pytransformer.kernels._common import dropout_threshold, keep_columns, load, store

_SHARING = 16  # sequences whose positions one program loads once
_SEGMENT = 4096  # a segment expected to be longer is shared among programs


@triton.jit(do_not_specialize=["OUTER", "T", "threshold"])
def forward_kernel(
    tokens_ptr, weight_ptr, positions_ptr, segments_ptr, segment_weight_ptr, rng_ptr, y_ptr,
    OUTER, T, E, scale, threshold, keep_scale,
    SHARED: tl.constexpr, OCTETS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A tile of positions, in every ``num_programs(2)``-th sequence; ``SHARED`` positions are loaded once for them."""
    t, e0 = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None].to(tl.int64), tl.program_id(1) * BLOCK_E
    e = (e0 + tl.arange(0, BLOCK_E))[None, :]
    mask = (t < T) & (e < E)
    place = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    if SHARED:
        place = load(positions_ptr + t * E + e, mask)
    for outer in range(tl.program_id(2), OUTER, tl.num_programs(2)):
        n = outer * T + t
        token = tl.load(tokens_ptr + n, mask=t < T, other=0).to(tl.int64)
        y = load(weight_ptr + token * E + e, mask) * scale
        if SHARED:
            y += place
        elif positions_ptr is not None:
            y += load(positions_ptr + n * E + e, mask)
        if segments_ptr is not None:
            segment = tl.load(segments_ptr + n, mask=t < T, other=0).to(tl.int64)
            y += load(segment_weight_ptr + segment * E + e, mask)
        if rng_ptr is not None:
            y = tl.where(keep_columns(rng_ptr, n, e0, E, threshold, BLOCK_E, OCTETS), y * keep_scale, 0.0)
        store(y_ptr + n * E + e, y, mask)


@triton.jit(do_not_specialize=["V", "threshold", "parts"])
def table_gradient_kernel(
    dy_ptr, order_ptr, ends_ptr, rng_ptr, out_ptr, V, E, parts, scale, threshold, keep_scale,
    OCTETS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Part ``program_id(2)`` of the gradient of one row of a table: ``out_ptr`` [parts,V,E].

    ``order_ptr`` sorts the tokens, ``ends_ptr`` [V+1] says where in that order the tokens below each index end.
    """
    row, e0, part = tl.program_id(0), tl.program_id(1) * BLOCK_E, tl.program_id(2)
    first, last = tl.load(ends_ptr + row), tl.load(ends_ptr + row + 1)
    share = tl.cdiv(last - first, parts)
    first = tl.minimum(first + part * share, last)
    last = tl.minimum(first + share, last)
    e = (e0 + tl.arange(0, BLOCK_E))[None, :]
    total = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(first, last, BLOCK_N):
        at = (start + tl.arange(0, BLOCK_N))[:, None]
        n = tl.load(order_ptr + at, mask=at < last, other=0)
        dy = load(dy_ptr + n * E + e, (at < last) & (e < E))
        if rng_ptr is not None:
            dy = tl.where(keep_columns(rng_ptr, n, e0, E, threshold, BLOCK_E, OCTETS), dy * keep_scale, 0.0)
        total += tl.sum(dy, 0)
    place = (part.to(tl.int64) * V + row) * E + e0 + tl.arange(0, BLOCK_E)
    store(out_ptr + place, total * scale, e0 + tl.arange(0, BLOCK_E) < E)


@triton.jit(do_not_specialize=["OUTER", "T", "threshold"])
def position_gradient_kernel(
    dy_ptr, rng_ptr, out_ptr, OUTER, T, E, threshold, keep_scale,
    OCTETS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """float32 [T,E]: dy [OUTER,T,E] after dropout, summed over its first dimension in order."""
    t, e0 = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None].to(tl.int64), tl.program_id(1) * BLOCK_E
    e = (e0 + tl.arange(0, BLOCK_E))[None, :]
    mask = (t < T) & (e < E)
    total = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for outer in range(OUTER):
        n = outer * T + t
        dy = load(dy_ptr + n * E + e, mask)
        if rng_ptr is not None:
            dy = tl.where(keep_columns(rng_ptr, n, e0, E, threshold, BLOCK_E, OCTETS), dy * keep_scale, 0.0)
        total += dy
    tl.store(out_ptr + t * E + e, total, mask=mask)


def embedding_fwd(
    tokens: Tensor,
    weight: Tensor,
    positions: Tensor | None,
    segments: Tensor | None,
    segment_weight: Tensor | None,
    rng: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """y [outer,T,E] from contiguous tokens and segments [outer,T], and positions [outer,T,E], or [T,E] for all."""
    (outer, T), E = tokens.shape, weight.shape[1]
    y = torch.empty(outer, T, E, dtype=weight.dtype, device=weight.device)
    shared = positions is not None and positions.dim() == 2
    if positions is None:
        outer, T = 1, outer * T
    config = _configs.embedding(E, _configs.architecture(weight.device))
    block_n, block_e = config.tile
    sequences = triton.cdiv(outer, _SHARING) if shared else outer
    forward_kernel[(triton.cdiv(T, block_n), triton.cdiv(E, block_e), sequences)](
        tokens, weight, positions, segments, segment_weight, rng, y, outer, T, E, scale,
        *dropout_threshold(dropout_p),
        SHARED=shared, OCTETS=E % 8 == 0, BLOCK_N=block_n, BLOCK_E=block_e, **config.options,
    )  # fmt: skip
    return y


def table_gradient(dy: Tensor, tokens: Tensor, table: Tensor, rng: Tensor | None, scale: float, p: float) -> Tensor:
    """``scale`` times the rows of dy [N,E] after dropout, added up where ``tokens`` [N] names the row of ``table``."""
    (V, E), N = table.shape, tokens.numel()
    ordered, order = torch.sort(tokens, stable=True)
    ends = torch.searchsorted(ordered, torch.arange(V + 1, device=tokens.device, dtype=tokens.dtype))
    parts = min(max(triton.next_power_of_2(N // max(V, 1)) // _SEGMENT, 1), 64)
    dtype = table.dtype if parts == 1 else torch.float32
    found = torch.empty(parts, V, E, dtype=dtype, device=table.device)
    config = _configs.embedding(E, _configs.architecture(table.device))
    block_n, block_e = config.tile
    table_gradient_kernel[(V, triton.cdiv(E, block_e), parts)](
        dy, order, ends, rng, found, V, E, parts, scale, *dropout_threshold(p),
        OCTETS=E % 8 == 0, BLOCK_N=block_n, BLOCK_E=block_e, **config.options,
    )  # fmt: skip
    return found[0] if parts == 1 else found.sum(0).to(table.dtype)


def position_gradient(dy: Tensor, rng: Tensor | None, dropout_p: float) -> Tensor:
    """float32 [T,E]: contiguous dy [outer,T,E] after dropout, summed over its first dimension."""
    outer, T, E = dy.shape
    found = torch.empty(T, E, dtype=torch.float32, device=dy.device)
    config = _configs.embedding(E, _configs.architecture(dy.device))
    block_n, block_e = config.tile
    position_gradient_kernel[(triton.cdiv(T, block_n), triton.cdiv(E, block_e))](
        dy, rng, found, outer, T, E, *dropout_threshold(dropout_p),
        OCTETS=E % 8 == 0, BLOCK_N=block_n, BLOCK_E=block_e, **config.options,
    )  # fmt: skip
    return found
