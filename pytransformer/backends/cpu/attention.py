"""attention by ``csrc/cpu/attention.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer import _cpu
from pytransformer.backends._arguments import contiguous, over_scores, unpaged, unsupported_dtype


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
) -> str | None:
    if (reason := unsupported_dtype(query)) is not None:
        return reason
    if bias is not None and bias.dtype not in (query.dtype, torch.float32):
        return f"bias must be float32 or {query.dtype}, not {bias.dtype}"
    return unpaged(query, key, mask, bias, dropout_p, block_table)


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
) -> tuple[Tensor, Tensor]:
    B, H, T, _ = query.shape
    out = query.new_empty(B, H, T, value.shape[-1])
    lse = torch.empty(B, H, T)
    _cpu.attention_fwd(
        _unit_stride(query),
        _unit_stride(key),
        _unit_stride(value),
        mask,
        over_scores(bias, query, key),
        contiguous(key_lengths),
        band_lower,
        band_upper,
        scale,
        softcap,
        dropout_p,
        None if block_table is None else _unit_stride(block_table),
        out,
        lse,
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
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value = (torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
    # Summed over broadcast dimensions by torch, pairwise: a running sum in the kernel would lose digits.
    grad_bias = torch.zeros((*query.shape[:3], key.shape[2]) if needs_bias else 0)
    _cpu.attention_bwd(
        _unit_stride(query),
        _unit_stride(key),
        _unit_stride(value),
        mask,
        over_scores(bias, query, key),
        contiguous(key_lengths),
        band_lower,
        band_upper,
        scale,
        softcap,
        dropout_p,
        out,
        lse,
        _unit_stride(grad_out),
        grad_query,
        grad_key,
        grad_value,
        grad_bias if needs_bias else None,
        contiguous(rng),
    )
    if needs_bias and bias is not None:
        grad_bias = grad_bias.sum_to_size(bias.shape).to(bias.dtype)
    return grad_query, grad_key, grad_value, grad_bias


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
