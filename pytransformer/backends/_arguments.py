"""What the adapters of every backend ask of tensors, and how they shape them for the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

MOST_PAGED_ROWS = 64  # queries that share a key/value head, where keys and values lie in pages
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unsupported_dtype(x: Tensor) -> str | None:
    """Why no kernel takes a tensor of this dtype, or None."""
    return None if x.dtype in DTYPES else f"it takes float32, float16 and bfloat16, not {x.dtype}"


@overload
def rows(x: Tensor) -> Tensor: ...
@overload
def rows(x: Tensor | None) -> Tensor | None: ...
def rows(x: Tensor | None) -> Tensor | None:
    """[..., E] as contiguous [rows, E], without a copy where the memory allows it."""
    if x is None or (x.dim() == 2 and x.is_contiguous()):
        return x
    return x.contiguous().view(-1, x.shape[-1])


@overload
def contiguous(x: Tensor) -> Tensor: ...
@overload
def contiguous(x: Tensor | None) -> Tensor | None: ...
def contiguous(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.is_contiguous() else x.contiguous()


def over_scores(x: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask or bias as [B,H,T,S], the scores it is laid over."""
    return None if x is None else x.expand(*query.shape[:3], key.shape[2])


def unpaged(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    block_table: Tensor | None,
) -> str | None:
    """Why no kernel reads keys and values of this call from pages, or None."""
    if block_table is None:
        return None
    queries = query.shape[1] // max(key.shape[1], 1) * query.shape[2]
    if queries > MOST_PAGED_ROWS:
        return f"pages are read for up to {MOST_PAGED_ROWS} queries a key head, not {queries}"
    if mask is not None or bias is not None or dropout_p > 0:
        return "pages are read without mask, bias and dropout"
    return None


def unmasked(
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    block_table: Tensor | None,
    cu_seq_q: Tensor | None,
) -> str | None:
    """Why no kernel reads sequences of this call where they lie end to end, or None."""
    if cu_seq_q is None or all(x is None for x in (mask, bias, key_lengths, block_table)):
        return None
    return "sequences end to end are read without mask, bias, key_lengths and pages"


def misplaced(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    dropout_p: float,
    block_table: Tensor | None,
    cu_seq_q: Tensor | None,
) -> str | None:
    """Why no kernel reads this call's tensors where they lie, in pages or end to end, or None."""
    unpacked = unmasked(mask, bias, key_lengths, block_table, cu_seq_q)
    return unpacked or unpaged(query, key, mask, bias, dropout_p, block_table)


@overload
def unit_stride(x: Tensor) -> Tensor: ...
@overload
def unit_stride(x: Tensor | None) -> Tensor | None: ...
def unit_stride(x: Tensor | None) -> Tensor | None:
    """``x``, or a copy of it whose last dimension is contiguous."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def empty_heads(shape: Sequence[int], empty: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """``empty`` of [B,H,T,D] as it lies in every result of attention: the heads of a token together, [B,T,H,D].

    So do torch's own, and what follows takes a token's heads as one row, without a copy.
    """
    B, H, T, D = shape
    return empty((B, T, H, D)).transpose(1, 2)


class Packing(NamedTuple):
    """Sequences that lie end to end, as kernels read them; or none, and nothing changes.

    A packed tensor is [1,H,T,D] for a caller and [N,H,longest,D] for a kernel: a view in which every sequence begins
    at the first row. The kernel adds the row where it does begin, ``cu_seq[n]``, and computes none beyond
    ``cu_seq[n + 1]``.
    """

    cu_seq_q: Tensor | None = None
    cu_seq_k: Tensor | None = None
    max_q: int = 0
    max_k: int = 0

    def queries(self, x: Tensor) -> Tensor:
        """What lies like the queries: query, out, lse and their gradients."""
        return x if self.cu_seq_q is None else self._each(x, self.cu_seq_q, self.max_q)

    def keys(self, x: Tensor) -> Tensor:
        """What lies like the keys."""
        return x if self.cu_seq_k is None else self._each(x, self.cu_seq_k, self.max_k)

    @staticmethod
    def _each(x: Tensor, cu_seq: Tensor, longest: int) -> Tensor:
        return x.narrow(2, 0, longest).expand(cu_seq.shape[0] - 1, *x.shape[1:2], longest, *x.shape[3:])


@overload
def flat(indices: Tensor) -> Tensor: ...
@overload
def flat(indices: Tensor | None) -> Tensor | None: ...
def flat(indices: Tensor | None) -> Tensor | None:
    """Indices as contiguous int64 [N]."""
    return None if indices is None else indices.flatten().long().contiguous()  # one column's view stays a view


def position_index(positions: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Which row of ``positions`` each token takes; None where they are taken in turn, again and again."""
    if positions is None:
        return None
    lead = positions.shape[:-1]
    while lead and lead[0] == 1:
        lead = lead[1:]
    if lead == tokens.shape[tokens.dim() - len(lead) :]:
        return None
    numbers = torch.arange(positions.shape[:-1].numel(), device=tokens.device).view(positions.shape[:-1])
    return numbers.expand(tokens.shape).flatten()
