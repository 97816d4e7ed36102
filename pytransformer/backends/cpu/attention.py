"""attention by ``csrc/cpu/attention.cpp``."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pytransformer import _cpu
from pytransformer.backends._arguments import (
    Packing,
    contiguous,
    empty_heads,
    misplaced,
    over_scores,
    unit_stride,
    unsupported_dtype,
)
from pytransformer.backends.cpu._memory import empty


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
    return misplaced(query, key, mask, bias, key_lengths, dropout_p, block_table, cu_seq_q)


def attention_fwd(
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
) -> tuple[Tensor, Tensor]:
    packing = Packing(contiguous(cu_seq_q), contiguous(cu_seq_k), max_q, max_k)
    fresh = partial(empty, dtype=query.dtype)
    out = empty_heads((*query.shape[:3], value.shape[-1]), fresh)
    lse = empty(query.shape[:3])
    _cpu.attention_fwd(
        packing.queries(unit_stride(query)),
        packing.keys(unit_stride(key)),
        packing.keys(unit_stride(value)),
        mask,
        over_scores(bias, query, key),
        contiguous(key_lengths),
        band_lower,
        band_upper,
        scale,
        softcap,
        dropout_p,
        unit_stride(block_table),
        packing.cu_seq_q,
        packing.cu_seq_k,
        at_end,
        packing.queries(out),
        packing.queries(lse),
        contiguous(rng),
    )
    return out, lse


def attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    rng: Tensor | None,
    band_lower: int | None,
    band_upper: int | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    cu_seq_q: Tensor | None,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    at_end: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packing = Packing(contiguous(cu_seq_q), contiguous(cu_seq_k), max_q, max_k)
    fresh = partial(empty, dtype=query.dtype)
    grad_query, grad_key, grad_value = (empty_heads(x.shape, fresh) for x in (query, key, value))
    # Summed over broadcast dimensions by torch, pairwise: a running sum in the kernel would lose digits.
    grad_bias = torch.zeros((*query.shape[:3], key.shape[2]) if needs_bias else 0)
    _cpu.attention_bwd(
        packing.queries(unit_stride(query)),
        packing.keys(unit_stride(key)),
        packing.keys(unit_stride(value)),
        mask,
        over_scores(bias, query, key),
        contiguous(key_lengths),
        band_lower,
        band_upper,
        scale,
        softcap,
        dropout_p,
        packing.cu_seq_q,
        packing.cu_seq_k,
        at_end,
        packing.queries(out),
        packing.queries(lse),
        packing.queries(unit_stride(grad_out)),
        packing.queries(grad_query),
        packing.keys(grad_key),
        packing.keys(grad_value),
        grad_bias if needs_bias else None,
        contiguous(rng),
    )
    if needs_bias and bias is not None:
        grad_bias = grad_bias.sum_to_size(bias.shape).to(bias.dtype)
    return grad_query, grad_key, grad_value, grad_bias
