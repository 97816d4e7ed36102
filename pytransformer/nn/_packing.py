"""Padding that is not computed: a stack runs on its real tokens alone.

Everything in a layer but attention looks at one token at a time, so a batch [B,L,E] with N real tokens can go through
projections, norms and feed-forward as [N,E]. So it can through attention, which reads sequences that lie end to end
where they lie, as long as the mask says no more than who is padding and whether attention is causal. Under any other
mask attention wants the batch back: queries, keys and values are scattered into zeros [B,L,...], attended with the
padding masked, and the real rows gathered again. That moves 4 E numbers a token, where the products that a padded token
would have cost are 12 E^2 multiplications.

Which tokens are real is a matter of values: finding out would stall a GPU and break a traced graph. So it is done for
tensors on the CPU in plain eager mode, and where at least one token in ``WORTHWHILE`` is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.masks import Mask
from pytransformer.nn._masks import is_of_keys, padding_of
from pytransformer.ops._op import plain_eager

WORTHWHILE = 8


@dataclass(frozen=True)
class Rows:
    """Where the rows that are computed stand in a batch.

    Attributes:
        real: bool [B,L], which of the batch they are; None for all. batch: B. length: L.
        index: int64 [N], increasing: b * L + l; None for all.
    """

    real: Tensor | None
    batch: int
    length: int
    index: Tensor | None = None

    @cached_property
    def offsets(self) -> tuple[Tensor, int]:
        """Where each sequence begins among the rows, int32 [B+1], and the length of the longest."""
        if self.real is None:
            return torch.arange(self.batch + 1, dtype=torch.int32) * self.length, self.length
        lengths = self.real.sum(1)
        begins = torch.zeros(self.batch + 1, dtype=torch.int32)
        torch.cumsum(lengths, 0, dtype=torch.int32, out=begins[1:])
        return begins, int(lengths.max())

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


class Sequences(NamedTuple):
    """What ``ops.attention_varlen`` is told of rows that lie end to end."""

    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int
    is_causal: bool


@dataclass(frozen=True)
class Packed:
    """What a layer is given in place of a mask when its input holds rows.

    Attributes:
        queries: the rows of the input. keys: those of the memory; in self-attention the same.
        mask: over the whole batch, as ``ops.attention`` takes it. added: to the scores, or None.
        sequences: the rows as sequences end to end, where that says the same as the mask; else None.
    """

    queries: Rows
    keys: Rows
    mask: Mask
    added: Tensor | None = None
    sequences: Sequences | None = None


def pack(queries: Rows, keys: Rows, mask: Mask, added: Tensor | None = None) -> Packed:
    """``Packed``, with the sequences where the mask hides exactly the keys that are no rows, and may be causal.

    Positions change where padding stands before or between tokens. Their order within a sequence does not, and that is
    all that causal self-attention looks at.
    """
    sequences = None
    order_matters = mask.causal and queries is not keys
    if added is None and mask.left is None and mask.right is None and not order_matters and _hides_padding(mask, keys):
        (cu_seq_q, max_q), (cu_seq_k, max_k) = queries.offsets, keys.offsets
        sequences = Sequences(cu_seq_q, cu_seq_k, max_q, max_k, mask.causal)
    return Packed(queries, keys, mask, added, sequences)


def _hides_padding(mask: Mask, keys: Rows) -> bool:
    """Does the mask, but for causality, hide exactly the keys that are no rows?"""
    if mask.keep is not None and not is_of_keys(mask.keep):
        return False
    hidden = padding_of(None, mask, (keys.batch, 1, 1, keys.length), True)
    if hidden is None or keys.real is None:
        return hidden is None and keys.real is None
    return torch.equal(~hidden, keys.real)


def worthwhile_rows(real: Tensor, *others: Tensor) -> Rows | None:
    """The rows of bool ``real`` [B,L], or None where all of them had better be computed.

    ``others`` take part in the call as well: nothing is packed unless all are ordinary tensors on the CPU.
    """
    if not plain_eager((real, *others)) or any(x.device.type != "cpu" for x in (real, *others)):
        return None
    count = int(real.sum())
    if count == 0 or count * WORTHWHILE > real.numel() * (WORTHWHILE - 1):
        return None
    return Rows(real, real.shape[0], real.shape[1], real.flatten().nonzero().squeeze(1))


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
