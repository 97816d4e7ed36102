"""The loss of a linear classifier, some rows at a time: the logits [N,V] are never stored whole.

    logits = softcap * tanh((x W^T + b) / softcap)
    loss_n = (1 - e) * (lse - logits[target]) + e * (lse - mean(logits)) + z * lse^2

For each chunk of rows torch's product writes the logits, one kernel reads them once for the largest, the sum of
exponentials, the target's and the mean, and, where gradients are wanted, once more to put their gradient in their
place: 10 bytes a logit in 16 bits with the product that reads them for dx, and the memory of one chunk. Products
with the gradient give dx, and add to dW in float32, so that a chunk costs no rounding.

p - 1 cancels for a target that is nearly certain: p is exp(x - largest) / sum from the row at hand and not from a
rounded lse.

Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", 2024; the chunks: Hsu et al., "Liger
Kernel", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pytransformer.kernels import _configs
from pytransformer.kernels._attention import tanh
from pytransformer.kernels._common import store
from pytransformer.kernels._matmul import accumulate


@triton.jit
def _logits(logits_ptr, rows, v, N, V, softcap, SOFTCAP: tl.constexpr):
    """``(logits, tanh)`` of a tile, -inf beyond the last class."""
    mask = (rows < N) & (v < V)
    x = tl.load(logits_ptr + rows.to(tl.int64) * V + v, mask=mask, other=float("-inf")).to(tl.float32)
    th = x
    if SOFTCAP:
        th = tanh(x / softcap)
        x = tl.where(v < V, th * softcap, float("-inf"))
    return x, th


@triton.jit(do_not_specialize=["N", "ignore_index"])
def row_kernel(
    logits_ptr, target_ptr, loss_ptr, lse_ptr, row_scale_ptr, stride_scale,
    N, V, ignore_index, smoothing, z_loss, softcap,
    SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Loss and lse of each row of logits [N,V]; with ``GRADIENT`` the logits become row_scale * dloss / dlogits."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, BLOCK_V)[None, :]
    target = tl.load(target_ptr + rows, mask=rows < N, other=ignore_index)
    counted = (target != ignore_index) & (rows < N)
    largest = tl.full((ROWS, BLOCK_V), float("-inf"), tl.float32)
    sums = tl.zeros((ROWS, BLOCK_V), tl.float32)
    at_target = tl.zeros((ROWS, BLOCK_V), tl.float32)
    total = tl.zeros((ROWS, BLOCK_V), tl.float32)
    for start in range(0, V, BLOCK_V):
        v = start + column
        x, _ = _logits(logits_ptr, rows, v, N, V, softcap, SOFTCAP)
        larger = tl.maximum(largest, x)
        pivot = tl.where(larger == float("-inf"), 0.0, larger)
        sums = sums * tl.exp(largest - pivot) + tl.exp(x - pivot)
        largest = larger
        at_target += tl.where(v == target, x, 0.0)
        if SMOOTHING:
            total += tl.where(v < V, x, 0.0)
    peak = tl.max(largest, 1)[:, None]
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    normaliser = tl.sum(sums * tl.exp(tl.where(sums == 0, 0.0, largest - peak)), 1)[:, None]
    lse = peak + tl.log(normaliser)
    loss = (1.0 - smoothing) * (lse - tl.sum(at_target, 1)[:, None]) + z_loss * lse * lse
    if SMOOTHING:
        loss += smoothing * (lse - tl.sum(total, 1)[:, None] / V)
    tl.store(loss_ptr + rows, tl.where(counted, loss, 0.0), mask=rows < N)
    tl.store(lse_ptr + rows, tl.where(counted, lse, 0.0), mask=rows < N)
    if GRADIENT:
        row_scale = tl.load(row_scale_ptr + rows * stride_scale, mask=rows < N, other=0.0)
        weight = (1.0 + 2.0 * z_loss * lse) / normaliser
        for start in range(0, V, BLOCK_V):
            v = start + column
            x, th = _logits(logits_ptr, rows, v, N, V, softcap, SOFTCAP)
            gradient = tl.exp(x - peak) * weight - tl.where(v == target, 1.0 - smoothing, 0.0) - smoothing / V
            if SOFTCAP:
                gradient *= 1.0 - th * th
            gradient = tl.where(counted, gradient * row_scale, 0.0)
            store(logits_ptr + rows.to(tl.int64) * V + v, gradient, (rows < N) & (v < V))


@dataclass(frozen=True)
class Loss:
    """The options of the loss; a softcap of 0 is none."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


def losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: Loss,
    row_scale: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """``(loss, lse, gradients)``: float32 [N] each, and the gradients of x, weight and bias that ``needs`` asks for.

    x is contiguous [N,E], weight [V,E], target int64 [N]. The gradients are of the losses' sum, each loss times its
    ``row_scale``, float32 [N] or [1].
    """
    N, V = x.shape[0], weight.shape[0]
    loss, lse = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(2))
    config = _configs.cross_entropy(V, _configs.architecture(x.device))
    chunk = _configs.logits_rows(N, V * x.element_size(), _configs.architecture(x.device))
    sums = _Gradients(x, weight, needs, whole=chunk >= N)
    for start in range(0, N, chunk):
        part = slice(start, min(start + chunk, N))
        logits = F.linear(x[part], weight, bias)
        rows, columns = config.tile
        row_kernel[(triton.cdiv(logits.shape[0], rows),)](
            logits, target[part], loss[part], lse[part],
            row_scale if row_scale.numel() == 1 else row_scale[part], 0 if row_scale.numel() == 1 else 1,
            logits.shape[0], V, options.ignore_index, options.label_smoothing, options.z_loss, options.softcap,
            SMOOTHING=options.label_smoothing > 0, SOFTCAP=options.softcap > 0, GRADIENT=any(needs),
            ROWS=rows, BLOCK_V=columns, **config.options,
        )  # fmt: skip
        if any(needs):
            sums.add(part, logits)
    return loss, lse, sums.found()


class _Gradients:
    """Adds up what the gradient of each chunk's logits gives."""

    def __init__(self, x: Tensor, weight: Tensor, needs: Sequence[bool], whole: bool) -> None:
        self.x, self.weight, self.whole = x, weight, whole
        needs_x, needs_weight, needs_bias = needs
        wide = {"dtype": torch.float32, "device": x.device}
        self.dx = torch.empty_like(x) if needs_x else None
        self.dweight = torch.zeros(weight.shape, **wide) if needs_weight and not whole else None
        self.dbias = torch.zeros(weight.shape[0], **wide) if needs_bias else None
        self.needs_weight = needs_weight

    def add(self, part: slice, dlogits: Tensor) -> None:
        if self.dx is not None:
            torch.mm(dlogits, self.weight, out=self.dx[part])
        if self.needs_weight and self.whole:
            self.dweight = dlogits.mT @ self.x
        elif self.dweight is not None:
            accumulate(self.dweight, dlogits.mT, self.x[part])
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=torch.float32)

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of x, weight and bias, in the dtype of x."""
        dweight, dbias = (None if g is None else g.to(self.x.dtype) for g in (self.dweight, self.dbias))
        return self.dx, dweight, dbias
