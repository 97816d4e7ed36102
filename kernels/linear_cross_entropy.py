"""The losses of rows whose logits stand in memory, and the gradient of the logits in their place.

    x = softcap * tanh(logits / softcap), or logits
    loss = (1 - e) * (lse - x[target]) + e * (lse - mean(x)) + z * lse^2
    dloss/dx = (1 + 2 z lse) * exp(x - largest) / sum - (1 - e) [v = target] - e / V

A program has a row: it reads it once for the largest value and the sum of exponentials and, where the gradient is
wanted, once more to replace it. Both are running numbers of a lane, whose loads are of 16 bytes: eight values share
one rescaling in 16 bits. Rows lie apart by a multiple of 16 elements, so that a bound on the columns leaves whole
vectors; what lies between the last class and the next row may be anything.

p - 1 cancels for a target that is nearly certain: p is exp(x - largest) / sum from the row at hand and not from a
rounded lse.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pytransformer.kernels import _configs
from pytransformer.kernels._attention import tanh
from pytransformer.kernels._common import store


@triton.jit
def _capped(x, softcap, SOFTCAP: tl.constexpr):
    """``(capped, tanh)``; of a soft cap of 0, x itself."""
    th = x
    if SOFTCAP:
        th = tanh(x / softcap)
        x = th * softcap
    return x, th


@triton.jit
def _logits(row_ptr, v, rows, N, V, stride, softcap, SOFTCAP: tl.constexpr):
    """``(logits, tanh)`` of a tile [rows,lanes,values], -inf beyond the last class."""
    x = tl.load(row_ptr + v, mask=(rows < N) & (v < stride), other=float("-inf")).to(tl.float32)
    x, th = _capped(x, softcap, SOFTCAP)
    return tl.where(v < V, x, float("-inf")), th


@triton.jit(do_not_specialize=["N", "ignore_index"])
def row_kernel(
    logits_ptr, target_ptr, loss_ptr, lse_ptr, row_scale_ptr, stride, stride_scale,
    N, V, ignore_index, smoothing, z_loss, softcap,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Loss and lse of each row of logits [N,V]; with ``row_scale`` the logits become row_scale * dloss / dlogits.

    A target that is no class is not followed: its loss is NaN.
    """
    LANES: tl.constexpr = BLOCK_V // VECTOR
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target = tl.load(target_ptr + row, mask=row < N, other=ignore_index)
    counted = (target != ignore_index) & (row < N)
    known = counted & (target >= 0) & (target < V)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    logit = tl.load(row_ptr + target, mask=known, other=0.0).to(tl.float32)
    at_target = tl.where(known, _capped(logit, softcap, SOFTCAP)[0], float("nan"))
    rows, row_ptr = row[:, None, None], row_ptr[:, None, None]
    classes = tl.where(known, target, -1).to(tl.int32)[:, None, None]
    column = tl.arange(0, LANES)[None, :, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    largest = tl.full((ROWS, LANES), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS, LANES), tl.float32)
    total = tl.zeros((ROWS, LANES), tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + column
        x = _logits(row_ptr, v, rows, N, V, stride, softcap, SOFTCAP)[0]
        larger = tl.maximum(largest, tl.max(x, 2))
        pivot = tl.where(larger == float("-inf"), 0.0, larger)
        sums = sums * tl.exp(largest - pivot) + tl.sum(tl.exp(x - pivot[:, :, None]), 2)
        largest = larger
        if SMOOTHING:
            total += tl.sum(tl.where(v < V, x, 0.0), 2)
    peak = tl.max(largest, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    normaliser = tl.sum(sums * tl.exp(tl.where(sums == 0, 0.0, largest - peak[:, None])), 1)
    lse = peak + tl.log(normaliser)
    loss = (1.0 - smoothing) * (lse - at_target) + z_loss * lse * lse
    if SMOOTHING:
        loss += smoothing * (lse - tl.sum(total, 1) / V)
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0), mask=row < N)
    tl.store(lse_ptr + row, tl.where(counted, lse, 0.0), mask=row < N)
    if row_scale_ptr is not None:
        row_scale = tl.load(row_scale_ptr + row * stride_scale, mask=row < N, other=0.0)[:, None, None]
        weight = ((1.0 + 2.0 * z_loss * lse) / normaliser)[:, None, None]
        peak, counted = peak[:, None, None], counted[:, None, None]
        for start in range(0, V, BLOCK_V):
            v = start + column
            x, th = _logits(row_ptr, v, rows, N, V, stride, softcap, SOFTCAP)
            gradient = tl.exp(x - peak) * weight - tl.where(v == classes, 1.0 - smoothing, 0.0) - smoothing / V
            if SOFTCAP:
                gradient *= 1.0 - th * th
            store(row_ptr + v, tl.where(counted, gradient * row_scale, 0.0), (rows < N) & (v < stride))


def cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    options: tuple[int, float, float, float],
    row_scale: Tensor | None,
    loss: Tensor,
    lse: Tensor,
) -> None:
    """Writes ``loss`` and ``lse``, float32 [n], of logits [n,V] and target int64 [n].

    ``options`` are ignore_index, label_smoothing, z_loss and softcap, of which 0 is none. The rows of the logits lie
    apart by a multiple of 16. With ``row_scale``, float32 [n] or [1], the logits become
    ``row_scale * dloss / dlogits``.
    """
    N, V = logits.shape
    _, label_smoothing, _, softcap = options
    config = _configs.cross_entropy(V, _configs.architecture(logits.device))
    rows, columns = config.tile
    row_kernel[(triton.cdiv(N, rows),)](
        logits, target, loss, lse, row_scale, logits.stride(0), int(row_scale is not None and row_scale.numel() > 1),
        N, V, *options,
        SMOOTHING=label_smoothing > 0, SOFTCAP=softcap > 0,
        ROWS=rows, BLOCK_V=columns, VECTOR=16 // logits.element_size(), **config.options,
    )  # fmt: skip
