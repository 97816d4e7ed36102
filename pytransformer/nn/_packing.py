"""Padding that is not computed: a stack runs on its real tokens alone.

Everything in a layer but attention looks at one token at a time, so a batch [B,L,E] with N real tokens can go through
projections, norms and feed-forward as [N,E]. Attention alone wants the batch back: queries, keys and values are
scattered into zeros [B,L,...], attended with the padding masked, and the real rows gathered again. That moves 4 E
numbers a token, where the products that a padded token would have cost are 12 E^2 multiplications.

Which tokens are real is a matter of values: finding out would stall a GPU and break a traced graph. So it is done for
tensors on the CPU in plain eager mode, and where at least one token in ``WORTHWHILE`` is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytransformer.masks import Mask
from pytransformer.ops._op import plain_eager

WORTHWHILE = 8


@dataclass(frozen=True)
class Rows:
    """Where the rows that are computed stand in a batch.

    Attributes:
        index: int64 [N], increasing: b * L + l; None for all. batch: B. length: L.
    """

    index: Tensor | None
    batch: int
    length: int

    def gather(self, x: Tensor) -> Tensor:
        """[N,...] of [B,L,...]."""
        if self.index is None:
            return x.flatten(0, 1)
        out: Tensor = _Gather.apply(x.flatten(0, 1), self.index)  # type: ignore[no-untyped-call]
        return out

    def scatter(self, x: Tensor) -> Tensor:
        """[B,L,...] of [N,...], zeros elsewhere."""
        if self.index is None:
            return x.view(self.batch, self.length, *x.shape[1:])
        rows: Tensor = _Scatter.apply(x, self.index, self.batch * self.length)  # type: ignore[no-untyped-call]
        return rows.view(self.batch, self.length, *x.shape[1:])


@dataclass(frozen=True)
class Packed:
    """What a layer is given in place of a mask when its input holds rows.

    Attributes:
        queries: the rows of the input. keys: those of the memory; in self-attention the same.
        mask: over the whole batch, as ``ops.attention`` takes it. added: to the scores, or None.
    """

    queries: Rows
    keys: Rows
    mask: Mask
    added: Tensor | None = None


def worthwhile_rows(real: Tensor, *others: Tensor) -> Rows | None:
    """The rows of bool ``real`` [B,L], or None where all of them had better be computed.

    ``others`` take part in the call as well: nothing is packed unless all are ordinary tensors on the CPU.
    """
    if not plain_eager((real, *others)) or any(x.device.type != "cpu" for x in (real, *others)):
        return None
    count = int(real.sum())
    if count == 0 or count * WORTHWHILE > real.numel() * (WORTHWHILE - 1):
        return None
    return Rows(real.flatten().nonzero().squeeze(1), *real.shape)


class _Gather(torch.autograd.Function):
    """Rows of x. No row is taken twice, so the gradient is a plain copy and no sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Scatter.apply(grad, *ctx.saved_tensors, ctx.count), None  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    """x in some rows of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Gather.apply(grad, *ctx.saved_tensors), None, None  # type: ignore[no-untyped-call]
