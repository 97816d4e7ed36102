"""attention by ``csrc/cuda/attention*.cu``."""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer import _cuda
from pytransformer.backends._arguments import (
    Packing,
    contiguous,
    empty_heads,
    misplaced,
    over_scores,
    unit_stride,
)
from pytransformer.backends.cuda._arguments import Call, call, outpaced

WIDEST_HEAD = 256
LONGEST = 2**29  # positions, and the ends of bands among them, are int32
LARGE = 2**34  # operations: from there on Triton's kernels take less time on an H200, host and all
CHUNK = 8  # elements of 16 bytes: kernels read rows in such pieces


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
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {query.dtype}; Triton's kernels serve float32"
    if bias is not None and bias.dtype not in (query.dtype, torch.float32):
        return f"bias must be float32 or {query.dtype}, not {bias.dtype}"
    if max(query.shape[-1], value.shape[-1]) > WIDEST_HEAD:
        return f"head dims go up to {WIDEST_HEAD}, got {query.shape[-1]} and {value.shape[-1]}"
    longest = max(query.shape[2], key.shape[2] * (1 if block_table is None else block_table.shape[1]))
    if longest > LONGEST:
        return f"lengths go up to {LONGEST}, got {longest}"
    if block_table is not None and (query.shape[-1] % CHUNK or value.shape[-1] % CHUNK):
        return f"in pages head dims must be multiples of {CHUNK}, got {query.shape[-1]} and {value.shape[-1]}"
    return misplaced(query, key, mask, bias, key_lengths, dropout_p, block_table, cu_seq_q)


def yields_to(
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
) -> tuple[str, str] | None:
    if block_table is not None:  # of few queries, which reading the keys takes all the time of
        return None
    B, H, T, D = query.shape
    keys = key.shape[2] if cu_seq_k is None else max_k
    return outpaced(query, 2 * B * H * T * keys * (D + value.shape[-1]), LARGE)


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
    width = value.shape[-1]
    out = _results(query, width)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    query, scale = _positive(query, scale)
    query = packing.queries(_aligned(query))
    key, value = (packing.keys(_aligned(x)) for x in (key, value))
    mask = over_scores(mask, query, key)
    block_table = unit_stride(block_table)
    _cuda.attention_fwd(
        query,
        key,
        value,
        mask,
        over_scores(bias, query, key),
        contiguous(key_lengths),
        band_lower,
        band_upper,
        scale,
        softcap,
        dropout_p,
        block_table,
        packing.cu_seq_q,
        packing.cu_seq_k,
        at_end,
        packing.queries(out),
        packing.queries(lse),
        _call(query, key, value, mask, rng, dropout_p, packing, block_table),
    )
    return _narrowed(out, width), lse


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
    widths = query.shape[-1], key.shape[-1], value.shape[-1]
    grads = [_results(x, width) for x, width in zip((query, key, value), widths, strict=True)]
    # Summed over broadcast dimensions by torch, pairwise. Tiles that nobody sees are not written.
    size = (*query.shape[:3], key.shape[2]) if needs_bias else 0
    grad_bias = torch.zeros(size, dtype=torch.float32, device=query.device)
    signed = scale
    query, scale = _positive(query, scale)
    query, out, grad_out = (packing.queries(_aligned(x)) for x in (query, out, grad_out))
    key, value = (packing.keys(_aligned(x)) for x in (key, value))
    mask = over_scores(mask, query, key)
    lse = packing.queries(lse)
    _cuda.attention_bwd(
        query,
        key,
        value,
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
        out,
        lse,
        grad_out,
        packing.queries(grads[0]),
        packing.keys(grads[1]),
        packing.keys(grads[2]),
        grad_bias if needs_bias else None,
        _call(query, key, value, mask, rng, dropout_p, packing, lse=lse),
    )
    if needs_bias and bias is not None:
        grad_bias = grad_bias.sum_to_size(bias.shape).to(bias.dtype)
    grad_query, grad_key, grad_value = (_narrowed(x, width) for x, width in zip(grads, widths, strict=True))
    return _positive(grad_query, signed)[0], grad_key, grad_value, grad_bias


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    packing: Packing,
    block_table: Tensor | None = None,
    lse: Tensor | None = None,
) -> Call:
    offsets = (packing.cu_seq_q, packing.cu_seq_k)
    needed = _cuda.attention_workspace(query, key, value, mask, block_table, *offsets, dropout_p, lse)
    workspace = torch.empty(-(-needed // 4), dtype=torch.int32, device=query.device) if needed else None
    return call(query, contiguous(rng), workspace)


def _positive(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """Kernels take a positive scale, so its sign goes to the query."""
    if scale > 0:
        return query, scale
    return (-query if scale < 0 else torch.zeros_like(query)), abs(scale) or 1.0


def _whole(width: int) -> int:
    """``width`` in whole chunks."""
    return width + -width % CHUNK


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy of it, as kernels read it: rows of whole chunks, filled up with zeros, that start at chunks."""
    batch, head, row, last = x.stride()
    width = x.shape[-1]
    if width % CHUNK:
        return torch.nn.functional.pad(x, (0, _whole(width) - width))
    if last == 1 and x.data_ptr() % 16 == 0:
        if (batch | head | row) % CHUNK == 0:
            return x
        if all(stride % CHUNK == 0 for stride, size in zip((batch, head, row), x.shape, strict=False) if size > 1):
            return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def _results(like: Tensor, width: int) -> Tensor:
    """Where a kernel writes rows of ``width``, in whole chunks."""
    return empty_heads((*like.shape[:3], _whole(width)), like.new_empty)


def _narrowed(x: Tensor, width: int) -> Tensor:
    """The first ``width`` columns of results, laid out as if there had been no more."""
    if x.shape[-1] == width:
        return x
    return empty_heads((*x.shape[:3], width), x.new_empty).copy_(x.narrow(-1, 0, width))
