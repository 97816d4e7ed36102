"""attention by ``kernels/attention.py`` and ``kernels/attention_bwd.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer.backends._arguments import (
    Packing,
    contiguous,
    misplaced,
    over_scores,
    unit_stride,
    unsupported_dtype,
)
from pytransformer.kernels import attention as forward_kernels
from pytransformer.kernels import attention_bwd as backward_kernels
from pytransformer.kernels import attention_decode as decode_kernels

WIDEST_HEAD = 256
_REACH = 2**31  # elements: how far the kernels count from the first row of a head to its others
PACKS_MASKS = True  # `packed` keeps what is made of a mask, where it may be kept


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    rng: Tensor | None,
    band_lower: int | None,
    band_upper: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    block_table: Tensor | None = None,
    cu_seq_q: Tensor | None = None,
    cu_seq_k: Tensor | None = None,
    max_q: int = 0,
    max_k: int = 0,
    at_end: bool = False,
) -> str | None:
    if (reason := unsupported_dtype(query)) is not None:
        return reason
    if bias is not None and bias.dtype not in (query.dtype, torch.float32):
        return f"bias must be float32 or {query.dtype}, not {bias.dtype}"
    if max(query.shape[-1], value.shape[-1]) > WIDEST_HEAD:
        return f"head dims go up to {WIDEST_HEAD}, got {query.shape[-1]} and {value.shape[-1]}"
    if at_end and block_table is None and cu_seq_q is None:
        return "a band counts from the end in pages, and of sequences end to end, only"
    queries, keys = (query.shape[2], key.shape[2]) if cu_seq_q is None else (max_q, max_k)
    if not (_in_reach(query, queries) and _in_reach(key, keys) and _in_reach(value, keys)):
        return f"it takes no rows of a head that are {_REACH} elements apart"
    return misplaced(query, key, mask, bias, key_lengths, dropout_p, block_table, cu_seq_q)


def _in_reach(x: Tensor, rows: int) -> bool:
    return bool((rows - 1) * x.stride(2) < _REACH)


def attention_fwd(
    query: Tensor, key: Tensor, value: Tensor, *options: Any, packed: dict[Any, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """The arguments of ``reference.attention``; returns ``(out, lse)``."""
    *rest, block_table, cu_seq_q, cu_seq_k, max_q, max_k, at_end = options
    packing = Packing(contiguous(cu_seq_q), contiguous(cu_seq_k), max_q, max_k)
    query, key, value = (unit_stride(x) for x in (query, key, value))
    query, masks, softmax = _arguments(query, key, packed, packing, at_end, *rest)
    query, key, value = packing.queries(query), packing.keys(key), packing.keys(value)
    table = unit_stride(block_table)
    splits = decode_kernels.splits_of(query, key, softmax, table)
    if splits > 1 or table is not None:
        out, lse = decode_kernels.attention_decode(query, key, value, masks, softmax, splits, table)
    else:
        out, lse = forward_kernels.attention_fwd(query, key, value, masks, softmax)
    return out, lse


def attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
    packed: dict[Any, Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *rest, cu_seq_q, cu_seq_k, max_q, max_k, at_end, needs_bias = options
    bias, scale = rest[1], rest[6]
    packing = Packing(contiguous(cu_seq_q), contiguous(cu_seq_k), max_q, max_k)
    grad_out, query, key, value = (unit_stride(x) for x in (grad_out, query, key, value))
    query, masks, softmax = _arguments(query, key, packed, packing, at_end, *rest)
    if not _in_reach(grad_out, grad_out.shape[2]):
        grad_out = grad_out.contiguous()
    grad_out, query = packing.queries(grad_out), packing.queries(query)
    key, value = packing.keys(key), packing.keys(value)
    out = contiguous(out.transpose(1, 2)).transpose(1, 2)  # as the forward laid it
    grad_query, grad_key, grad_value, delta = backward_kernels.attention_bwd(
        grad_out, query, key, value, out, lse, masks, softmax
    )
    if scale <= 0:
        grad_query = _signed(grad_query, scale)
    grad_bias = query.new_empty(0)
    if needs_bias:
        grad_bias = backward_kernels.attention_dbias(
            bias.shape, grad_out, query, key, value, lse, delta, masks, softmax
        ).to(bias.dtype)
    return grad_query, grad_key, grad_value, grad_bias


def _arguments(
    query: Tensor,
    key: Tensor,
    packed: dict[Any, Any] | None,
    packing: Packing,
    at_end: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    rng: Tensor | None,
    band_lower: int | None,
    band_upper: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Any, Any]:
    """The query and the kernels' own arguments; kernels take a positive scale, so its sign goes to the query."""
    if scale <= 0:
        query, scale = _signed(query, scale), abs(scale) or 1.0
    sequences = None
    if packing.cu_seq_q is not None and packing.cu_seq_k is not None:
        offsets = packing.cu_seq_q, packing.cu_seq_k
        sequences = forward_kernels.Sequences(*offsets, query.shape[2], key.shape[2], at_end)
    masks = forward_kernels.masking(
        over_scores(mask, query, key),
        over_scores(bias, query, key),
        contiguous(key_lengths),
        band_lower,
        band_upper,
        packed,
        sequences,
    )
    return query, masks, forward_kernels.Softmax(scale, softcap, dropout_p, rng)


def _signed(x: Tensor, scale: float) -> Tensor:
    return -x if scale < 0 else torch.zeros_like(x)
